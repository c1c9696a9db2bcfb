"""Triton reads this when it is first imported: set before any test module imports torch."""

import os

os.environ["TRITON_INTERPRET"] = "1"
