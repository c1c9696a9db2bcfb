"""config.json to the eager reference decoder. Only `decoder` and `rope` import torch."""
