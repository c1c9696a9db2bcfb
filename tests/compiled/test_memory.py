"""The plan is the truth: the arena is exactly its size, and a lifetime cut short is found out."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aios_compile import compile_settings
from aios_compile.capture.capture import capture
from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.codegen.cpp import build
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.codegen.emit_kernels import Emitted, emit_kernels
from aios_compile.codegen.lower import lower
from aios_compile.codegen.manifest import WEIGHTS
from aios_compile.codegen.program import Launch, Program
from aios_compile.compiled_model import CompiledModel
from aios_compile.config import CompileOptions
from aios_compile.engine_sizes import make_limits
from aios_compile.ir.lifetimes import Lifetime, Placement
from aios_compile.ir.module import IRModule
from aios_compile.ir.refresh import refresh
from aios_compile.model_source import ModelSource, open_source
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.runner import run_pipeline
from aios_compile.progress import Progress
from aios_compile.runtime import huge_pages, program_runner, weight_memory
from aios_compile.runtime.batch import Executor, Limits
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.executor import CpuExecutor
from aios_compile.runtime.memory import PAGE, Region
from aios_compile.runtime.program_runner import ProgramRunner
from tests import zoo
from tests.compiled.conftest import Load
from tests.quick_builds import build_quickly

NAME = "qwen3_gqa"
# One step takes all tokens: many tiles of rows, so that kernels read after they have written.
LONG_STEPS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
Logits = np.ndarray[Any, Any]


def weights_of(model: CompiledModel) -> dict[str, Logits]:
    return {w.name: model._artefact.tensor(w.name) for w in model.program.weights}


class Guarded(CpuExecutor):
    """An executor whose arena ends at a page that may not be touched; it unloads its library."""

    def close(self) -> None:
        super().close()
        if self.library is not None:
            build.unload(self.library)
        self.library = None

    library: ctypes.CDLL | None = None


def guarded(model: CompiledModel, program: Program, library: Path, limits: Limits) -> Guarded:
    loaded = build.load(library)
    runner = ProgramRunner(
        program,
        loaded,
        weights_of(model),
        model.options.threads(),
        num_pages=limits.num_pages,
        page_table_width=limits.max_pages_per_sequence,
        guarded=True,
    )
    executor = Guarded(runner, limits)
    executor.library = loaded
    return executor


def test_an_arena_of_the_planned_bytes_suffices(load: Load) -> None:
    plain = load(NAME)

    def make(limits: Limits) -> Executor:
        return guarded(plain, plain.program, plain._artefact.library, limits)

    with CompiledModel(plain.artefact_path, plain.options, Progress(show=False), make) as model:
        ids = zoo.token_ids(Path(plain.program.settings["name"]))
        assert torch.equal(model(ids), plain(ids))
        given = {"max_tokens": 20, "temperature": 0, "logprobs": 2}
        one, two = (m.generate([ids[:17], ids[:3]], **given) for m in (model, plain))
        assert [r.outputs for r in one] == [r.outputs for r in two]


@pytest.mark.skipif(not huge_pages.allowed(), reason="the system gives no huge pages")
def test_a_short_context_takes_no_huge_pages_of_the_pool(load: Load) -> None:
    model = load(NAME)
    library = build.load(model._artefact.library)
    runner = ProgramRunner(model.program, library, weights_of(model), 1, num_pages=4096)
    pool, states = runner._kv, runner._states.tolist()
    begin, end = pool.address // HUGE_PAGE + 1, (pool.address + pool.num_bytes) // HUGE_PAGE

    def num_huge() -> int:
        found = huge_pages.find(begin * HUGE_PAGE, end * HUGE_PAGE)
        if found is None:
            pytest.skip("this kernel does not say where huge pages are")
        return sum(last - first for first, last in found) // HUGE_PAGE

    for touched, want in ((0, 0), (program_runner.SHORT_BYTES + HUGE_PAGE, len(states))):
        for state in states:
            ctypes.memset(state + touched, 1, 1)
        assert num_huge() == want
    runner.close()
    build.unload(library)


@pytest.mark.skipif(not huge_pages.allowed(), reason="the system gives no huge pages")
def test_tokens_do_not_change_while_weights_move(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "logprobs": 2}
    plain = load(NAME)
    want = plain.generate([5, 6, 7], **given).outputs
    plain.close()
    for name, value in (("LEAST_BYTES", 0), ("DELAY_SECONDS", 0.0), ("BYTES_A_SECOND", 1 << 24)):
        monkeypatch.setattr(weight_memory, name, value)
    monkeypatch.setattr(huge_pages, "find", lambda begin, end: None)
    model = load(NAME)
    memory = model._opened.memory
    assert memory is not None and memory._thread is not None, "begun by the warm-up"
    alive = True
    while alive:
        alive = memory._thread.is_alive()
        assert model.generate([5, 6, 7], **given).outputs == want
    assert "2 in huge pages, 2 of them moved" in str(model.report())
    model.close()
    assert str(model.artefact_path / WEIGHTS) not in Path("/proc/self/maps").read_text()


def test_the_plan_is_consistent(load: Load) -> None:
    model = load(NAME)
    plan = model.memory_plan
    assert plan.lower_bound_bytes <= plan.arena_bytes <= plan.naive_bytes
    assert plan.arena_bytes <= 1.1 * plan.lower_bound_bytes
    launches = [c for f in model.program.functions for c in f.items if isinstance(c, Launch)]
    adds = [c for c in launches if c.label.startswith("add_rms_norm")]
    assert adds and all(c.operands[3] in c.operands[:2] for c in adds), "the sum is made in place"
    outer = [b for b in plan.buffers if "/" not in b.name]
    assert max(b.offset + b.bytes for b in outer) <= plan.arena_bytes
    for i, a in enumerate(outer):
        for b in outer[i + 1 :]:
            apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
            assert apart or a.last < b.first or b.last < a.first, (a.name, b.name)


def test_a_touch_past_the_arena_ends_the_process() -> None:
    """The guard itself works: one byte more than planned is a segmentation fault."""
    region = Region(PAGE + 64, guarded=True)
    assert region.address % 64 == 0
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.memset(region.address + region.num_bytes, 0, 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    region.close()


@dataclass
class Level3:
    """A model up to its kernels, so that each test only plans and links again."""

    module: IRModule
    emitted: Emitted
    source: ModelSource
    options: CompileOptions
    model: CompiledModel
    ids: list[int]
    expected: Logits

    def program(self, planner: Callable[[Sequence[Lifetime]], Placement]) -> Program:
        sizes = self.options.resolve_sizes(self.source.max_model_len)
        settings = compile_settings.settings_of(self.source, self.module, sizes)
        limits = compile_settings.limits_of(self.module, sizes)
        return lower(self.module, self.emitted, limits, settings, planner)

    def logits(self, program: Program, folder: Path) -> Logits:
        target, sources = build.Target.host(), self.emitted.sources
        step = emit_step(program, tuple(sources))
        texts: list[build.Source] = [*sources, ("step", step)]
        root = self.model.artefact_path.parents[2]
        objects = build.build_objects(texts, root / "objects", target)
        library = folder / "lib.so"
        build.link(objects, library)
        limits = make_limits(program, self.options, 1 << 30)
        with Engine(guarded(self.model, program, library, limits)) as engine:
            return np.array(engine.logits(self.ids))


@pytest.fixture(scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOS_VERIFY", "0")
        build_quickly(patch)
        yield


@pytest.fixture(scope="module")
def level3(zoo_folder: Path, _quick: None) -> Iterator[Level3]:
    import aios_compile

    path = zoo.make(NAME, zoo_folder)
    options = CompileOptions(**LONG_STEPS, num_threads=1, progress=False)
    source = open_source(path, options)
    sizes = options.resolve_sizes(source.max_model_len)
    plain = source.build()
    module = capture(plain, flat=True, max_tokens=sizes.max_num_batched_tokens)
    run_pipeline(module, STAGES, compile_settings.pass_options(options, sizes, plain), verify=0)
    refresh(module)
    emitted = emit_kernels(module, EMITTERS)
    ids = zoo.token_ids(path)
    with aios_compile.load_and_compile(path, **LONG_STEPS, num_threads=1, progress=False) as model:
        yield Level3(module, emitted, source, options, model, ids, model(ids).numpy())


def test_the_plan_as_it_is_gives_the_logits(level3: Level3, tmp_path: Path) -> None:
    program = level3.program(plan_memory)
    assert program.plan == level3.model.memory_plan
    assert np.array_equal(level3.logits(program, tmp_path), level3.expected)


APART = 1024  # bytes: a few rows of the model's activations


def cut_short(name: str) -> Callable[[Sequence[Lifetime]], Placement]:
    """Return a planner that believes that `name` dies in the phase that writes it.

    It then gives its bytes to the largest buffer that is born while `name` is still needed, some
    rows apart: a kernel that overwrites each row after it has read it would do no harm.
    """

    def plan(lifetimes: Sequence[Lifetime]) -> Placement:
        found = next((b for b in lifetimes if b.name == name), None)
        if found is None:
            return plan_memory(lifetimes)
        short = dataclasses.replace(found, last=found.first)
        changed = [short if b is found else b for b in lifetimes]
        placed = plan_memory(changed)
        later = [b for b in lifetimes if found.first < b.first <= found.last]
        taker = max(later, key=lambda b: b.bytes)
        offsets = {b: offset + APART for b, offset in placed.offsets.items()}
        offsets[name] = offsets[taker.name] - APART
        end = max(offsets[b.name] + -(-b.bytes // 64) * 64 for b in lifetimes)
        return dataclasses.replace(placed, offsets=offsets, arena_bytes=end)

    return plan


# Buffers by the kernel that makes them. Left out are inputs of a linear: one work item copies them
# before it writes, so that at this size sharing does no harm with one thread.
CUT = (
    "linear", "qk_norm_rope_kv_write.0", "linear_1", "embedding_1", "to_copy_cat_cos_sin.0",
    "to_copy_cat_cos_sin.1", "layer_1.0",
)  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_lifetime_cut_short_is_found_out(level3: Level3, name: str, tmp_path: Path) -> None:
    program = level3.program(cut_short(name))
    assert program.plan.buffers != level3.model.memory_plan.buffers
    wrong = level3.logits(program, tmp_path)
    off = np.abs(wrong - level3.expected).max()
    print(name, off)
    assert not off <= 100 * zoo.TOLERANCE  # or NaN


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def test_a_step_allocates_nothing(load: Load) -> None:
    model = load(NAME, num_threads=2)
    assert model.runner is not None
    runner, calls = model.runner, []
    run = runner.run
    runner.run = lambda *given: (calls.append(given), run(*given))[1]  # type: ignore[method-assign]
    model.generate([list(range(30)), [1]], max_tokens=3, temperature=0)
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _MallInfo
    last = calls[-1]

    def steps(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            run(*last)
        now, maps = info(), len(Path("/proc/self/maps").read_text().splitlines())
        return now.uordblks, now.hblkhd, maps

    steps(20)
    before = steps(1)
    after = steps(200)
    assert abs(after[0] - before[0]) < 4096 and after[1:] == before[1:]
    tracemalloc.start()
    try:
        steps(5)
        tracemalloc.reset_peak()
        start, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            run(*last)
        end, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert end - start < 2048 and peak - start < 4096  # ctypes' own temporaries
    assert program_runner.__file__
