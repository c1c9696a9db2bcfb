"""One cache of objects for all models, and a quick compiler: most kernels are shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import aios_compile
from aios_compile import CompiledModel
from tests.conftest import shared_folder
from tests.quick_builds import build_quickly

OPTIONS = {
    "max_model_len": 96,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 2,
    "num_threads": 1,
    "kv_cache_memory_bytes": 1 << 22,
    "progress": False,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's cache: its workers share their objects."""
    return shared_folder(tmp_path_factory) / "foreign-cache"


@pytest.fixture
def compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompiledModel]:
    """Return a function that compiles a module; quickly, as these tests are about meaning."""
    torch.set_num_threads(1)
    build_quickly(monkeypatch)
    monkeypatch.setenv("AIOS_VERIFY", "0")  # the logits are compared here, end to end
    return lambda model, **options: aios_compile.load_and_compile(
        model, cache_dir=folder, **{**OPTIONS, **options}
    )
