"""Tests that need a GPU; `make gpu` runs them. Triton compiles here, it does not interpret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:  # without one, tests of the interpreter may be in the same run
    os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder; a run may be of others, too."""
    for item in items:
        if not HAS_GPU and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
