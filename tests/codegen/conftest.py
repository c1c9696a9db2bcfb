"""Triton reads this when it is first imported, so it is set before any test module imports torch."""

import os

os.environ["TRITON_INTERPRET"] = "1"
