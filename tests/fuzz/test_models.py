"""Whole tiny models of random configurations; `make nightly` runs 25 of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aios_compile.study.fuzz.models import draw_config, run_model
from tests.quick_builds import build_quickly

MODELS = max(1, int(os.environ.get("FUZZ_EXAMPLES", "200")) // 200)
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.mark.parametrize("number", range(MODELS))
def test_a_model_of_a_random_configuration(
    number: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_quickly(monkeypatch)
    cache = tmp_path_factory.getbasetemp() / "model-cache"
    config = draw_config(SEED, number)
    assert run_model(config, tmp_path / "model", cache, number) <= 1
