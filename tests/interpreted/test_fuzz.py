"""Random programs on the Triton target, its kernels in the interpreter, against eager.

make test runs 4 of them; FUZZ_TRITON=N runs N (make nightly: 1,000), from number FUZZ_FIRST on.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from aios_compile.study.fuzz import interpreted
from aios_compile.study.fuzz.campaign import run_campaign
from aios_compile.study.fuzz.example import Example, FuzzFailure, Setup, run_example
from aios_compile.study.fuzz.generate import draw
from aios_compile.study.fuzz.program import Parameter, Program, Statement
from aios_compile.study.fuzz.report import rare
from tests.fuzz.parts import write_part

EXAMPLES = int(os.environ.get("FUZZ_TRITON", "4"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PARTS = 2


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_equal_eager(part: int, tmp_path: Path) -> None:
    """Operators without a Triton emitter are refused by name, and never wrong."""
    tally = run_campaign(
        range(FIRST + part, FIRST + EXAMPLES, PARTS),
        seed=SEED,
        objects=tmp_path / "objects",
        scripts=Path(os.environ.get("FUZZ_REPORT", tmp_path)),
        target="triton",
    )
    write_part(tally, FIRST, part)
    assert not tally.failures, tally.failures
    assert all(r.startswith("CodegenError") for r in tally.refused), tally.refused
    assert sum(tally.refused.values()) <= max(1, tally.examples // 50), tally.refused
    if tally.examples >= 500:
        assert not rare("triton", tally.fired, tally.examples)


def test_a_transposed_weight_is_packed(tmp_path: Path) -> None:
    """Found by number 66: a kernel reads rows, and the recipe gave a view of columns."""
    x, w = Parameter("x", ("T", 24)), Parameter("w", (24, 17), kind="weight", scale=0.3)
    program = Program((x, w), (Statement("v", "torch.mm(x, w)"),), ("v",))
    outcome = run_example(Example(program, Setup(tokens=(1,), target="triton")), tmp_path)
    assert outcome.hits["raise_linear"] and not outcome.refused


def test_quantised_weights_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that is one too large in every row is seen."""
    example = draw(5, 6, passes=("quantize_weights",), target="triton")
    example = replace(example, setup=replace(example.setup, target="triton"))
    outcome = run_example(example, tmp_path)
    assert outcome.hits["quantize_weights"] and not outcome.refused
    pack = interpreted.pack_planar

    def shifted(*arguments: Any) -> Any:
        packed = pack(*arguments)
        packed[:, 0] += 1
        return packed

    monkeypatch.setattr(interpreted, "pack_planar", shifted)
    with pytest.raises(FuzzFailure, match="wrong"):
        run_example(example, tmp_path)


@pytest.mark.nightly
def test_codes_are_not_moved_for_a_second_opinion(tmp_path: Path) -> None:
    """Found by the first caches of e4m3 here: torch multiplies no 8-bit floats."""
    example = draw(6, 8, passes=("quantize_kv",), target="triton")
    example = replace(example, setup=replace(example.setup, target="triton"))
    outcome = run_example(example, tmp_path)
    assert example.setup.kv == "e4m3" and outcome.second and outcome.hits["quantize_kv"]
