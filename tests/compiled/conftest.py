"""Compiled zoo models. Artefacts and objects are cached for the run: a kernel costs g++ once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import aios_compile
import aios_compile.compiler  # and all that it captures with: see tests/shared_captures.py
from tests import zoo
from tests.quick_builds import build_quickly

torch.set_num_threads(1)
Load = Callable[..., aios_compile.CompiledModel]
# A prefill of 48 tokens takes three steps, none of which ends at a page border (16).
SMALL_STEPS = {"max_num_batched_tokens": 21, "max_num_seqs": 8}
MODELS = "zoo-models"


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models; the same in every worker of a run."""
    folder = tmp_path_factory.getbasetemp() / MODELS
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def as_shipped() -> None:
    """Ask for models built with the flags of users, not quick_builds.py's."""


@pytest.fixture
def load(
    request: pytest.FixtureRequest, zoo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Load]:
    """Return a function that loads a zoo model by name (or a folder), closed after the test.

    Passes are not certified again (they have their own tests) unless a test sets AIOS_VERIFY. Steps
    are begun ahead on every machine, also where it does not pay.
    """
    monkeypatch.setenv("AIOS_VERIFY", "0")
    if "AIOS_OVERLAP" not in os.environ:
        monkeypatch.setenv("AIOS_OVERLAP", "2")
    if "as_shipped" not in request.fixturenames:
        build_quickly(monkeypatch)
    loaded: list[aios_compile.CompiledModel] = []

    def load_one(source: str | Path, dtype: str = "float32", **options: Any) -> Any:
        path = zoo.make(source, zoo_folder, dtype) if isinstance(source, str) else source
        given = {**SMALL_STEPS, "num_threads": 1, "progress": False, **options}
        model = aios_compile.load_and_compile(path, **given)
        loaded.append(model)
        return model

    yield load_one
    for model in loaded:
        model.close()
