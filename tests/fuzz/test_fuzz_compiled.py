"""Random graphs: compiled equals eager, judged by float64. `make nightly` runs 5,000 of them."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.compiled.harness import compile_graph
from tests.fuzz.graphs import Program, programs
from tests.passes.helpers import trace

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
PARTS = 4
TOKENS = st.sampled_from([1, 2, 3, 15, 16, 17, 40])


def reference_error(program: Program, inputs: dict[str, torch.Tensor]) -> tuple[list, list]:
    """Return the float64 results, and eager float32's own largest error for each."""
    function = program.function()
    wide = function(*(t.double() for t in inputs.values()))
    eager = function(*inputs.values())
    return list(wide), [float((e.double() - w).abs().max()) for e, w in zip(eager, wide)]


def check(program: Program, num_tokens: int, values: int) -> None:
    module = trace(program.function(), values)
    weights = dict(module.tensors)
    compiled = compile_graph(module, {"T": 40})
    generator = torch.Generator().manual_seed(values)
    shape = (num_tokens, program.width)
    free = {n: torch.randn(shape, generator=generator) for n in ("x", "y")}
    wide, errors = reference_error(program, {**free, **weights})
    got = compiled({"T": num_tokens}, **free)
    compiled.runner.close()
    for i, (result, want, error) in enumerate(zip(got, wide, errors)):
        magnitude = max(1.0, float(want.abs().max()))
        budget = 4 * error + 4 * torch.finfo(torch.float32).eps * magnitude
        assert result.shape == want.shape
        worst = float((result.double() - want).abs().max())
        assert worst <= budget, f"output {i}: error {worst:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("part", range(PARTS))
def test_compiled_equals_eager(part: int) -> None:
    """Each part draws its own examples from its own seed, so that parts can run side by side."""

    @seed(part)
    @settings(
        max_examples=EXAMPLES // PARTS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs, TOKENS, st.integers(0, 1000))
    def run(program: Program, num_tokens: int, values: int) -> None:
        check(program, num_tokens, values)

    run()
