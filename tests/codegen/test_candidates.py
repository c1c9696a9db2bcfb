"""Candidates of kernels: the same bits as the standard one, and what the clock says is chosen."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aios_compile.codegen.artefact import Artefact
from aios_compile.codegen.cpp import build, candidates, linear, quantized_linear
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.codegen.kernel_choices import STANDARD, KernelChoices, Trial, everywhere
from aios_compile.codegen.operand import SizeExpr
from aios_compile.codegen.packing import pack_pairs16, pack_quant16
from aios_compile.codegen.program import (
    Function,
    Kernel,
    Launch,
    MemoryPlan,
    Program,
    Ref,
    TensorEntry,
    WeightEntry,
)
from aios_compile.codegen.source import Candidate, KernelSource
from aios_compile.ir import ops
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.runtime import select_kernels as selection
from aios_compile.runtime.program_runner import ProgramRunner
from aios_compile.runtime.select_kernels import Step, select_kernels
from tests.codegen.harness import FOLDER, make_body
from tests.codegen.test_quantized_linear import random_rows

assert ops.TABLE
QUICK = ("-O1",)  # the meaning is tested, not the speed
FORM = "int4_g32_f16"
COLUMNS, DEPTH, MOST = 40, 4096, 200  # 200 tokens are several chunks, one of which is wide
SMALL = ("into_l2", "unfetched")


def source_of(kind: str) -> tuple[KernelSource, np.ndarray]:
    """Return the kernel of a linear with candidates, and its packed weights."""
    inputs: dict[str, Any] = {"x": (("T", DEPTH), torch.float32)}
    if kind == "pairs":
        inputs["w"] = ((COLUMNS, DEPTH), torch.bfloat16)
        rng = np.random.default_rng(0)
        bits = rng.standard_normal((COLUMNS, DEPTH), dtype=np.float32).view(np.uint32) >> 16
        weights, emitter, layout = pack_pairs16(bits.astype(np.uint16)), linear, "pairs16"

        def function(x: Any, w: Any) -> Any:
            return torch.ops.aios.bf16_linear.default(x, w)
    else:
        form = QuantFormat.parse(FORM)
        inputs["w"] = ((COLUMNS, form.row_bytes(DEPTH)), torch.uint8)
        weights = pack_quant16(random_rows(FORM, COLUMNS, DEPTH).numpy(), form)
        emitter, layout = quantized_linear, f"quant16.{FORM}"

        def function(x: Any, w: Any) -> Any:
            return torch.ops.aios.quantized_linear.default(x, w, FORM)

    body, operands = make_body(function, inputs, packed={"w": layout})
    spec = emitter.spec_of(body, operands)
    assert spec is not None
    return emitter.emit(spec), weights


def program_of(source: KernelSource, weights: np.ndarray) -> Program:
    """Return a step of one launch: x -> out0."""
    columns = 4 * COLUMNS * MOST
    operands = (Ref("input", 0), Ref("weight", 0), Ref("arena", 0), Ref("arena", columns))
    (space,) = source.workspace
    words = int(np.prod([d if isinstance(d, int) else MOST + 12 for d in space.shape]))
    return Program(
        kernels=(Kernel(source.name, source.symbol, "", (), source.candidates),),
        functions=(Function("step", (Launch(0, operands, 0, "linear"),)),),
        weights=(WeightEntry("w", "u8", weights.shape, "quant16", ""),),
        inputs=(TensorEntry("x", "f32", (MOST, DEPTH)),),
        outputs=(TensorEntry("y", "f32", (MOST, COLUMNS), 0),),
        states=(),
        plan=MemoryPlan(columns + 4 * words, 0, 0, ()),
        sizes={},
        num_launches=1,
        settings={},
    )


@pytest.fixture(scope="module", params=["pairs", "int4"])
def runner(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "LEAST_BYTES", 0)
        source, weights = source_of(request.param)
    assert tuple(c.name for c in source.candidates) == SMALL
    program, target = program_of(source, weights), build.Target.host()
    texts: list[build.Source] = [source, ("step", emit_step(program, (source,)))]
    objects = build.build_objects(texts, FOLDER, target, jobs=2, extra_flags=QUICK)
    library = build.load(build.link(objects, objects[1].with_suffix(".so"), target))
    found = ProgramRunner(program, library, {"w": weights}, 2)
    yield found
    found.close()


def run(runner: ProgramRunner, x: np.ndarray) -> bytes:
    runner.outputs["y"][:] = np.nan
    runner.run({"x": x}, len(x), 1, 1)
    return runner.outputs["y"][: len(x)].tobytes()


@pytest.mark.parametrize("tokens", [1, 2, 8, 13, MOST])
def test_every_candidate_gives_the_same_bits(runner: ProgramRunner, tokens: int) -> None:
    x = np.random.default_rng(tokens).standard_normal((tokens, DEPTH), dtype=np.float32)
    runner.choose(KernelChoices())
    want = run(runner, x)
    assert not np.isnan(np.frombuffer(want, np.float32)).any()
    for name in SMALL:
        choices = everywhere(runner.program, name)
        assert choices.table(runner.program).tolist() == [[1 + SMALL.index(name)]]
        runner.choose(choices)
        assert run(runner, x) == want, name


def test_a_candidate_runs_where_it_was_chosen(runner: ProgramRunner) -> None:
    """The library's functions are called through the table: one that is broken is seen."""
    x = np.ones((1, DEPTH), np.float32)
    kernel = runner.program.kernels[0]
    runner.choose(KernelChoices((1,), {kernel.name: ("unfetched", STANDARD)}))
    assert runner._choices.tolist() == [[2], [0]]
    seen = []
    for tokens in (1, 2):
        run(runner, np.repeat(x, tokens, 0))
        seen.append(ctypes.c_uint8.from_address(runner._slots[0].run.choices).value)
    assert seen == [2, 0]


def test_kernels_are_timed_and_the_ledger_is_read_back(runner: ProgramRunner) -> None:
    steps = [Step({"x": np.ones((t, DEPTH), np.float32)}, t, 1, 1) for t in (1, 8, MOST)]
    found = select_kernels(runner, steps, seconds=0.5)
    assert found.buckets == (1, 8)
    (names,) = (found.chosen or {}).values()
    assert len(names) == 3 and set(names) <= {STANDARD, *SMALL}
    assert {(t.tokens, t.candidate) for t in found.trials} >= {(1, "into_l2"), (1, "unfetched")}
    assert all(t.standard_us > 0 for t in found.trials)
    assert KernelChoices.from_json(found.to_json()) == found
    assert f"{runner.num_threads} threads" in found.notes[-1]
    times = np.zeros(1, np.int64)
    run(runner, steps[0].inputs["x"])
    assert not times.any() and runner._slots[0].run.nanoseconds is None


CANDIDATES = (Candidate("a", "A", 1, 1, ""), Candidate("b", "B", 1, 100, ""))


class Clock:
    """In place of a runner: kernels take what a table says, with noise."""

    num_threads = 2

    def __init__(self, times: dict[str, list[float]], noise: float = 0.01) -> None:
        names = ("first", "second")
        kernels = [SimpleNamespace(name=n, candidates=CANDIDATES) for n in names]
        outputs = [TensorEntry("y", "f32", (SizeExpr(((("T",), 1),)), 2), 0)]
        self.program: Any = SimpleNamespace(kernels=kernels, outputs=outputs, sizes={"T": 300})
        self.outputs = {"y": np.zeros((300, 2), np.float32)}
        self.sizes: set[tuple[int, ...]] = set()
        self.wrong: tuple[str, int] = ("", 0)  # a candidate, and the token that it gets wrong
        self._times, self._noise = times, noise
        self._rng, self._now = np.random.default_rng(0), KernelChoices()

    def choose(self, choices: KernelChoices) -> None:
        self._now = choices

    def time_kernels(self, into: Any) -> None:
        self._into = into

    def run(self, inputs: Any, num_tokens: int, num_seqs: int, num_rows: int) -> None:
        self.sizes.add((num_tokens, num_seqs, num_rows))
        name = next(iter((self._now.chosen or {}).values()), (STANDARD,))[0]
        self.outputs["y"][self.wrong[1]] = name == self.wrong[0]
        factors = self._rng.normal(1, self._noise, 2)
        self._into += (1e6 * np.array(self._times[name]) * factors).astype(np.int64)


def test_the_clock_decides_for_each_kernel_and_bucket() -> None:
    clock: Any = Clock({STANDARD: [10, 10], "a": [8, 10], "b": [9, 10.1]})
    found = select_kernels(clock, [Step({}, t, 1, 1) for t in (1, 8, 200)], seconds=1)
    assert found.chosen == {
        "first": ("a", "b", STANDARD),
        "second": (STANDARD, STANDARD, STANDARD),
    }
    trial = next(t for t in found.trials if t.kernel == "first" and t.candidate == "a")
    assert trial.chosen and trial.speedup == pytest.approx(1.25, rel=0.03)
    loser = next(t for t in found.trials if t.kernel == "first" and t.candidate == "b")
    assert loser.tokens == 1 and loser.speedup > 1.05 and not loser.chosen
    assert any("200 tokens: no candidate differs" in line for line in found.lines())
    assert any("chosen" in line for line in found.lines())


def test_a_wrong_candidate_is_not_used_however_fast_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one token is enough; what is behind the step's tokens is nobody's result."""
    clock: Any = Clock({STANDARD: [10, 10], "a": [8, 8], "b": [1, 1]})
    clock.wrong = ("b", 7)
    found = select_kernels(clock, [Step({}, t, 3, 2) for t in (1, 7, 8)], seconds=1)
    assert clock.sizes == {(1, 3, 2), (7, 3, 2), (8, 3, 2)}
    assert found.chosen == {"first": ("b", "b", STANDARD), "second": ("b", "b", STANDARD)}
    assert "8 tokens: b is not used, its results differ: a wrong kernel" in found.notes
    assert {(t.tokens, t.candidate) for t in found.trials} == {(1, "a"), (1, "b"), (7, "b")}
    monkeypatch.setattr(selection, "FIRST_IN_HUGE_PAGES", "b")  # not even where nothing is timed
    found = select_kernels(clock, [Step({}, t, 1, 1) for t in (7, 8)], seconds=0, huge_pages=True)
    assert found.chosen == {"first": ("b", STANDARD), "second": ("b", STANDARD)}


def test_what_is_best_in_huge_pages_stays_unless_something_beats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "FIRST_IN_HUGE_PAGES", "a")
    steps = [Step({}, t, 1, 1) for t in (1, 8)]
    clock: Any = Clock({STANDARD: [10, 8], "a": [10, 10], "b": [10, 9]})
    for seconds, second in ((1, STANDARD), (0, "a")):
        found = select_kernels(clock, steps, seconds=seconds, huge_pages=True)
        assert found.huge_pages and KernelChoices.from_json(found.to_json()) == found
        assert found.chosen == {"first": ("a", STANDARD), "second": (second, STANDARD)}
    assert select_kernels(clock, steps, seconds=0).chosen == dict.fromkeys(
        ("first", "second"), (STANDARD, STANDARD)
    )


def test_noise_chooses_nothing() -> None:
    """1 % faster among steps that differ by 30 % is chosen by chance only; 15 % are seen."""
    chosen = {0.3: 0, 0.03: 0}
    for noise, factor in ((0.3, 0.99), (0.03, 0.85)):
        for seed in range(20):
            clock: Any = Clock({STANDARD: [10, 10], "a": [10 * factor] * 2, "b": [10, 10]}, noise)
            clock._rng = np.random.default_rng(seed)
            found = select_kernels(clock, [Step({}, 1, 1, 1)], seconds=1)
            chosen[noise] += sum(t.chosen for t in found.trials)
    assert chosen[0.3] <= 2, "of 80 trials"
    assert chosen[0.03] == 40, "one candidate of two kernels, 20 times"


def test_the_budget_is_kept() -> None:
    clock: Any = Clock({STANDARD: [10, 10], "a": [5, 5], "b": [5, 5]})
    found = select_kernels(clock, [Step({}, 1, 1, 1)], seconds=0.0)
    assert not found.trials and "not timed" in found.notes[0]
    assert found.chosen == {"first": (STANDARD,), "second": (STANDARD,)}


def test_an_unknown_candidate_is_refused() -> None:
    program: Any = SimpleNamespace(kernels=[SimpleNamespace(name="k", candidates=CANDIDATES)])
    with pytest.raises(KeyError):
        KernelChoices((), {"k": ("c",)}).table(program)


def test_the_cost_model_leaves_out_what_cannot_differ() -> None:
    assert candidates.candidates_of((1 << 20) - 1) == ()
    found = {c.name: (c.least, c.most) for c in candidates.candidates_of(1 << 20)}
    assert found == {"into_l2": (1, 1), "unfetched": (1, 1)}


def test_an_artefact_without_a_ledger_has_standard_kernels(tmp_path: Any) -> None:
    artefact = Artefact(tmp_path, SimpleNamespace(), [])  # type: ignore[arg-type]
    assert artefact.kernel_choices == KernelChoices()
    assert isinstance(Trial("k", 1, "a", 1.0, 1.0, (1.0, 1.0), False), Trial)
