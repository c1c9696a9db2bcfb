"""The last level in eager PyTorch (AIOS_EAGER=1) against its kernels, and AIOS_VERIFY=2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aios_compile.errors import EngineError
from aios_compile.study import verify_logits
from tests import zoo
from tests.compiled.conftest import Load

NAME = "qwen3_gqa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_gives_the_same_tokens(
    dtype: str, load: Load, zoo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load(NAME, dtype)
    monkeypatch.setenv("AIOS_EAGER", "1")
    # few pages: the references copy the caches in every step
    eager = load(NAME, dtype, kv_cache_memory_bytes=1 << 18)
    assert eager.runner is None and "entries" not in eager.artefact_path.parts  # no cache
    assert "build" not in eager.progress.seconds
    ids = zoo.token_ids(zoo.make(NAME, zoo_folder, dtype))
    assert (eager(ids) - compiled(ids)).abs().max() <= (1e-2 if dtype == "bfloat16" else 1e-5)
    for fields in (
        {"temperature": 0},
        {"temperature": 0.9, "seed": 4, "top_p": 0.9, "logprobs": 3},
    ):
        given: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, **fields}
        prompts = [ids[:20], ids[5:9], ids[:1]]
        ours, theirs = compiled.generate(prompts, **given), eager.generate(prompts, **given)
        tokens = [[r.outputs[0].token_ids for r in results] for results in (ours, theirs)]
        assert tokens[0] == tokens[1]
    folder = eager.artefact_path
    eager.close()
    assert not folder.exists()


def test_verify_compares_the_loaded_model(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOS_VERIFY", "2")
    model = load(NAME)
    assert any("logits differ from eager by" in note for note in model.progress.notes)
    again = load(NAME)  # a cached start is verified too
    assert "cache hit" in again.progress.notes
    real: Callable[..., torch.nn.Module] = verify_logits.materialise

    def damaged(source: Any) -> torch.nn.Module:
        module = real(source)
        weights = dict(module.named_parameters())
        weights["model.layers.1.mlp.up_proj.weight"].data[3] *= 1.01
        return module

    monkeypatch.setattr(verify_logits, "materialise", damaged)
    with pytest.raises(EngineError, match=r"logits differ from eager by \d.*allowed"):
        load(NAME)


def test_verify_takes_a_module(
    load: Load, zoo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOS_VERIFY", "2")
    module = zoo.decoder(zoo.make(NAME, zoo_folder))
    import aios_compile

    with aios_compile.load_and_compile(
        module, max_model_len=64, num_threads=1, progress=False
    ) as m:
        assert any("logits differ from eager by" in note for note in m.progress.notes)
