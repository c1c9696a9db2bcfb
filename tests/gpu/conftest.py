"""Tests that need a GPU; `make gpu` runs them. Triton compiles here, it does not interpret."""

from __future__ import annotations

import os

import pytest

os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
