"""One cache of objects for all models, and a quick compiler: most kernels are shared."""

from __future__ import annotations

import os

import pytest
import torch

import aios_compile
from aios_compile.codegen.cpp import build

OPTIONS = {
    "max_model_len": 96,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 2,
    "num_threads": 1,
    "kv_cache_memory_bytes": 1 << 22,
    "progress": False,
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return a function that compiles a module (-O1: these tests are about meaning)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the run's folder: its workers share their objects
        folder = tmp_path_factory.getbasetemp().parent / "foreign-cache"
    real = build.build_objects

    def quick(*args, **keywords):
        return real(*args, **{**keywords, "extra_flags": ("-O1",)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOS_VERIFY", "0")  # the logits are compared here, end to end
        patch.setattr(build, "build_objects", quick)
        yield lambda model, **options: aios_compile.load_and_compile(
            model, cache_dir=folder, **{**OPTIONS, **options}
        )
