"""NaN and Inf: refused by name while packing; mid-run they end one request and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aios_compile.errors import CheckpointError
from aios_compile.runtime.events import Schedule
from tests import zoo
from tests.compiled.conftest import Load
from tests.variants import nightly

BAD = {
    "model.layers.1.self_attn.k_proj.weight": float("nan"),  # merged with q and v
    "model.layers.0.mlp.down_proj.weight": float("inf"),
    "model.norm.weight": float("-inf"),
    "model.embed_tokens.weight": float("nan"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in list(BAD)[:2]),
        *nightly(*((name, "float32") for name in list(BAD)[2:]), (next(iter(BAD)), "bfloat16")),
    ],
)
def test_bad_weights_are_refused_by_name(name: str, dtype: str, tmp_path: Path, load: Load) -> None:
    path = zoo.make("qwen3_gqa", tmp_path, dtype)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = BAD[name]
    save_file(tensors, str(file))
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        load(path)
    assert name in str(caught.value)


def test_nan_in_the_middle_ends_one_request_only(load: Load) -> None:
    """A page of one sequence is damaged while three run: the others do not notice."""
    model = load("qwen3_gqa")
    prompts = [[i, 5, 9, 20 + i] for i in range(3)]
    given = {"max_tokens": 30, "temperature": 0, "logprobs": 1}
    expected = model.generate(prompts, **given)
    core, runner = model.engine._core, model.runner
    assert runner is not None
    advance = core._advance

    def damaged(event: Any) -> Any:
        plan = advance(event)
        for state in core.state.sequences.values():
            sequence = core.sequences[state.sequence_id]
            victim = sequence.admitted.prompt_token_ids == prompts[1]
            if isinstance(event, Schedule) and victim and state.num_computed == 12:
                runner.poison_pages(state.pages)
        return plan

    core._advance = damaged  # type: ignore[method-assign]
    results = model.generate(prompts, **given)
    first, bad, last = (r.outputs[0] for r in results)
    assert bad.finish_reason == "error"
    assert bad.token_ids == expected[1].outputs[0].token_ids[: len(bad.token_ids)]
    assert 0 < len(bad.token_ids) < 30
    assert [first, last] == [expected[i].outputs[0] for i in (0, 2)]
    del core._advance
    again = model.generate(prompts, **given)  # damaged pages are written before they are read
    assert [r.outputs for r in again] == [r.outputs for r in expected]


def test_all_finite_weights_pass(load: Load) -> None:
    assert torch.isfinite(load("qwen3_gqa")([1, 2, 3])).all()
