"""sample_tokens: outputs, inputs and states after it; near misses; a second run."""

# ruff: noqa: F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir import sample_op
from aios_compile.ir.module import outputs
from aios_compile.ir.verifier import verify
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from aios_compile.passes.page_attention import page_attention
from aios_compile.passes.sample_tokens import RESULTS, sample_tokens
from tests.passes import helpers, level2


def test_the_sampler_is_appended_and_states_keep_their_outputs() -> None:
    module = level2.program()
    for function in (page_attention, gather_last_tokens):
        helpers.apply(function, module)
    before = {n: outputs(module.root.graph)[i] for n, i in module.states.items()}
    assert helpers.apply(sample_tokens, module).hits == {"layer": 0, "": 1}
    assert module.outputs == ("logits", *RESULTS)
    assert {n: outputs(module.root.graph)[i] for n, i in module.states.items()} == before
    assert set(sample_op.INPUTS) <= set(module.inputs.values())
    dtypes = [v.meta["val"].dtype for v in outputs(module.root.graph)[:7]]
    assert dtypes == [*(torch.float32, torch.int64, torch.float32, torch.int64), *dtypes[4:]]
    verify(module)
    assert helpers.apply(sample_tokens, module).total == 0


def test_greedy_ids_are_the_largest_logits() -> None:
    module = level2.program()
    for function in (page_attention, gather_last_tokens, sample_tokens):
        helpers.apply(function, module)
    result = level2.step(module, [(list(range(20)), 0, [2, 6])], level2.empty_caches(module))
    assert torch.equal(result["sampled_ids"], result["logits"].argmax(-1))
    assert result["finite"].all()


def test_logits_of_tokens_are_refused() -> None:
    def f(x: "f32[T, 64]") -> Any:
        return x * 2

    applied = helpers.apply(sample_tokens, helpers.trace(f))
    assert applied.total == 0
    assert "expected logits [R, V]" in applied.refusals[0]
