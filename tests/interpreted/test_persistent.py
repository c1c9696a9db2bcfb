"""A layer as one persistent launch: the bits of its kernels, in any order of its programs.

The interpreter runs each phase as a launch of its own; here the whole launch runs too, its programs
interleaved (interleaved.py), so that its flags are what keeps the phases apart.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.source import KernelSource
from aios_compile.runtime.gpu_executor import GpuExecutor
from tests.codegen.triton_modules import load
from tests.interpreted.harness import Model, batch, model
from tests.interpreted.interleaved import Deadlock, Pick, Turns, interleaved
from tests.variants import nightly

NAME = "qwen3_gqa"
PROGRAMS = 5  # fewer than the items of a phase, and no divisor of them


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(([(0, 1)],), id="one"),
        pytest.param(([(0, 3), (0, 2)], [(3, 1)]), id="mixed", marks=pytest.mark.nightly),
    ],
)
def test_steps_have_the_bits_of_separate_launches(steps: Any) -> None:
    plain, joined = model(NAME), model(NAME, persistent=True)
    layers = len(joined.program.function("layer").rows)
    assert plain.program.num_launches - joined.program.num_launches == 4 * layers
    ours, theirs = joined.executor(), plain.executor()
    for number, sequences in enumerate(steps):
        given = batch(sequences, seed=number)
        mine, other = ours.step(given), theirs.step(given)
        assert np.array_equal(mine.logits, other.logits)
        assert list(mine.sampled_ids) == list(other.sampled_ids)
    assert np.array_equal(ours.state_bytes(), theirs.state_bytes())
    assert set(ours.graphs) == ({8, 1} if len(steps) > 1 else {1}) and not ours._counters.any()


@dataclass
class Layers:
    """The layers' launches of a step, and memory as it was before: poison, but for inputs."""

    source: KernelSource
    executor: GpuExecutor
    sizes: dict[str, int]
    operands: list[list[Any]]
    memory: tuple[Any, ...]
    before: tuple[Any, ...]

    def run(self, text: str, turns: Turns | None = None, count: int = 1) -> tuple[Any, ...]:
        """Return arena and KV pages after a module's launches for the first `count` layers, which
        overlap if there are turns to take; its flags must be zeros.
        """
        for place, values in zip(self.memory, self.before):
            place.copy_(values)
        source = KernelSource(self.source.name, self.source.symbol, "triton", text, 0)
        module = load(source)
        with contextlib.nullcontext() if turns is None else interleaved(turns):
            for operands in self.operands[:count]:
                module.launch(operands, **self.sizes)
        assert not self.executor._counters.any(), "flags are left raised"
        return tuple(place.clone() for place in self.memory[:2])


@functools.cache
def layers(
    sequences: tuple[tuple[int, int], ...], count: int = 1
) -> tuple[Layers, tuple[Any, ...]]:
    """Return the layers of a step, and what phases as separate launches make of `count` of them."""
    built: Model = model(NAME, persistent=True)
    executor = built.executor(captures=False)
    executor._arena.fill_(255)  # NaN: what is read before it is written shows
    given = batch(sequences)
    sizes = executor.sizes_of(executor._bucket(given))
    executor.staging.fill(given)
    executor.staging.upload()
    first = next(i for i, call in enumerate(executor.calls) if call.region)
    for call in executor.calls[:first]:
        module = executor.modules[call.kernel]
        module.launch(
            [executor.operand(p, t, sizes) for p, t in zip(call.operands, module.TYPES)], **sizes
        )
    used = [call for call in executor.calls if call.region]
    types = executor.modules[used[0].kernel].TYPES
    operands = [
        [executor.operand(p, t, sizes) for p, t in zip(call.operands, types)] for call in used
    ]
    memory = (executor._arena, executor._states, executor._counters)
    before = tuple(place.clone() for place in memory)
    source = built.emitted.sources[used[0].kernel]
    found = Layers(source, executor, sizes, operands, memory, before)
    return found, found.run(source.text, count=count)


def whole(text: str, programs: int = PROGRAMS) -> str:
    """Return the module with one launch, of so many programs, for all phases."""
    found = text.replace("    if INTERPRETED.value:", "    if False:")
    assert found != text and ", 132, 5, num_warps" in text
    return found.replace(", 132, 5, num_warps", f", {programs}, 5, num_warps")


def highest(able: Any) -> int:
    return max(able)


def lowest(able: Any) -> int:
    return min(able)


def drawn(seed: int) -> Pick:
    return random.Random(seed).choice


def outcome(
    text: str, pick: Pick, sequences: Any, resident: int | None = None, count: int = 1
) -> bool:
    """Return whether a module's launches have the bits of the phases, with the flags cleared."""
    found, expected = layers(sequences, count)
    got = found.run(text, Turns(pick, resident), count)
    return all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param(((3, 1),), id="one"),
        pytest.param(((0, 3), (2, 1)), id="mixed", marks=pytest.mark.nightly),
    ],
)
def test_any_order_of_programs_has_the_same_bits(sequences: Any) -> None:
    found, _ = layers(sequences)
    text = whole(found.source.text)
    for pick in (highest, drawn(1))[: len(sequences)]:
        assert outcome(text, pick, sequences)
    if len(sequences) > 1:
        assert outcome(text, lowest, sequences) and outcome(text, drawn(2), sequences)
        idle = whole(found.source.text, 40)  # more programs than a phase has items
        assert outcome(idle, highest, sequences)


@pytest.mark.nightly
def test_launches_that_overlap_do_not_take_each_others_flags() -> None:
    """Two layers as dependent launches; the second's idle programs begin before the first ends."""
    found, _ = layers(((3, 1),), 2)
    text = whole(found.source.text, 40)
    for pick in (highest, lowest, drawn(1)):
        assert outcome(text, pick, ((3, 1),), count=2)
    for before in ("the launch before", "        else:"):  # idle programs, and those with items
        waits = f"{before}\n            wait_for_inputs()"
        fault = _replaced(waits, waits.replace("wait_for_inputs()", "pass"))(text)
        with pytest.raises((Deadlock, AssertionError)):
            assert outcome(fault, highest, ((3, 1),), count=2)


def test_a_head_is_attended_to_before_the_others_are_projected() -> None:
    """Its flag is a part of the phase before: four of five programs are through with attention."""
    found, expected = layers(((3, 1),))
    text, turns = whole(found.source.text), Turns(lowest)
    got = found.run(text, turns)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    first = int(text.partition("    flags = a")[2].partition("\n")[0].partition(" + ")[2])
    flags = [(x - found.executor._counters.data_ptr()) // 4 - first for x in turns.raised]
    projected, attended = {0, 32}, 64
    last = max(i for i, flag in enumerate(flags) if flag in projected)
    assert flags.index(attended) < last, flags


def test_more_programs_than_are_resident_never_end() -> None:
    """Why the executor refuses a device with fewer multiprocessors than the launch has programs."""
    found, _ = layers(((3, 1),))
    with pytest.raises(Deadlock):
        outcome(whole(found.source.text), lowest, ((3, 1),), resident=PROGRAMS - 1)


def _replaced(old: str, new: str, count: int = -1) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, count)

    return change


FAULTS = {
    "a phase waits for nothing": _replaced(
        "            await_phase(flag, items)", "            pass"
    ),
    "a phase waits for one item too few": _replaced(
        "while seen < items:", "while seen < items - 1:"
    ),
    "a phase waits for the flag before": _replaced("flags + 96, items_2", "flags + 64, items_1"),
    "a program says so before its items": _replaced(
        "    mine = (items - program + programs - 1) // programs",
        "    mine = (items - program + programs - 1) // programs + 1",
    ),
    "flags are cleared by the first": _replaced("== items_4:", "> 0:"),
    "flags are never cleared": _replaced(
        "tl.store(flags + flag * 32, 0", "tl.store(flags + flag * 0, 0"
    ),
    "one flag for two phases": _replaced("ended(flags + 128", "ended(flags + 96"),
    "a head waits for the first head": _replaced("flags + 0 + item // across_1 * 32", "flags + 0"),
    "a head waits for one tile too few": _replaced("* 32, 8, FIRST < 1", "* 32, 7, FIRST < 1"),
    "a tile is counted for another head": _replaced(
        "made(flags + 0 + head * 32)", "made(flags + 0 + (1 - head) * 32)"
    ),
}


@pytest.mark.parametrize(
    "fault",
    [*FAULTS][:2] + nightly(*[*FAULTS][2:-1]) + [*FAULTS][-1:],
)
def test_a_planted_fault_is_found(fault: str) -> None:
    """Wrong bits, flags that stay raised, or programs that never end, in one of a few orders."""
    found, _ = layers(((3, 1),))
    text = FAULTS[fault](whole(found.source.text))
    for pick in (highest, lowest, drawn(1), drawn(2), drawn(3)):
        try:
            if not outcome(text, pick, ((3, 1),)):
                return
        except (Deadlock, AssertionError):
            return
    pytest.fail(f"nobody noticed: {fault}")
