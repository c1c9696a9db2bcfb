"""A layer as one persistent launch: the bits of its kernels, in any order of its programs.

The interpreter runs each phase as a launch of its own; here the whole launch runs too, its programs
interleaved (interleaved.py), so that its flags are what keeps the phases apart.
"""

from __future__ import annotations

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

NAME = "qwen3_gqa"
PROGRAMS = 5  # fewer than the items of a phase, and no divisor of them


def test_steps_have_the_bits_of_separate_launches() -> None:
    plain, joined = model(NAME), model(NAME, persistent=True)
    layers = len(joined.program.function("layer").rows)
    assert plain.program.num_launches - joined.program.num_launches == 4 * layers
    ours, theirs = joined.executor(), plain.executor()
    for number, sequences in enumerate(([(0, 3), (0, 2)], [(3, 1)])):
        given = batch(sequences, seed=number)
        mine, other = ours.step(given), theirs.step(given)
        assert np.array_equal(mine.logits, other.logits)
        assert list(mine.sampled_ids) == list(other.sampled_ids)
    assert np.array_equal(ours.state_bytes(), theirs.state_bytes())
    assert set(ours.graphs) == {8, 1} and not ours._counters.any()


@dataclass
class Layer:
    """The first layer's launch of a step, and memory as it was before: poison, but for inputs."""

    source: KernelSource
    executor: GpuExecutor
    sizes: dict[str, int]
    operands: list[Any]
    memory: tuple[Any, ...]
    before: tuple[Any, ...]

    def run(self, text: str) -> tuple[Any, ...]:
        """Return arena and KV pages after the launch of a module; its flags must be zeros."""
        for place, values in zip(self.memory, self.before):
            place.copy_(values)
        source = KernelSource(self.source.name, self.source.symbol, "triton", text, 0)
        load(source).launch(self.operands, **self.sizes)
        assert not self.executor._counters.any(), "flags are left raised"
        return tuple(place.clone() for place in self.memory[:2])


@functools.cache
def layer(sequences: tuple[tuple[int, int], ...]) -> tuple[Layer, tuple[Any, ...]]:
    """Return the layer of a step, and what its phases as separate launches make of it."""
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
    call = executor.calls[first]
    types = executor.modules[call.kernel].TYPES
    operands = [executor.operand(p, t, sizes) for p, t in zip(call.operands, types)]
    memory = (executor._arena, executor._states, executor._counters)
    before = tuple(place.clone() for place in memory)
    source = built.emitted.sources[call.kernel]
    found = Layer(source, executor, sizes, operands, memory, before)
    return found, found.run(source.text)


def whole(text: str, programs: int = PROGRAMS) -> str:
    """Return the module with one launch, of so many programs, for all phases."""
    found = text.replace("if INTERPRETED.value else [(0, number)]", "if False else [(0, number)]")
    assert found != text and ", 132, 5, num_warps" in text
    return found.replace(", 132, 5, num_warps", f", {programs}, 5, num_warps")


def highest(able: Any) -> int:
    return max(able)


def lowest(able: Any) -> int:
    return min(able)


def drawn(seed: int) -> Pick:
    return random.Random(seed).choice


def outcome(text: str, pick: Pick, sequences: Any, resident: int | None = None) -> bool:
    """Return whether a module's launch has the bits of the phases, with its flags cleared."""
    found, expected = layer(sequences)
    with interleaved(Turns(pick, resident)):
        got = found.run(text)
    return all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("sequences", [((3, 1),), ((0, 3), (2, 1))], ids=["one", "mixed"])
def test_any_order_of_programs_has_the_same_bits(sequences: Any) -> None:
    found, _ = layer(sequences)
    text = whole(found.source.text)
    for pick in (highest, lowest, drawn(1)):
        assert outcome(text, pick, sequences)
    if sequences[0][0]:
        idle = whole(found.source.text, 40)  # more programs than a phase has items
        assert outcome(idle, drawn(3), sequences) and outcome(idle, highest, sequences)


def test_more_programs_than_are_resident_never_end() -> None:
    """Why the executor refuses a device with fewer multiprocessors than the launch has programs."""
    found, _ = layer(((3, 1),))
    assert outcome(whole(found.source.text), drawn(1), ((3, 1),), resident=PROGRAMS)
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
    "a phase waits for the flag before": _replaced("flags + 64, items_2", "flags + 32, items_1"),
    "a program says so before its items": _replaced(
        "    mine = (items - program + programs - 1) // programs",
        "    mine = (items - program + programs - 1) // programs + 1",
    ),
    "flags are cleared by the first": _replaced("== items_4:", "> 0:"),
    "flags are never cleared": _replaced(
        "tl.store(flags + flag * 32, 0", "tl.store(flags + flag * 0, 0"
    ),
    "one flag for two phases": _replaced("ended(flags + 96", "ended(flags + 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    """Wrong bits, flags that stay raised, or programs that never end, in one of a few orders."""
    found, _ = layer(((3, 1),))
    text = FAULTS[fault](whole(found.source.text))
    for pick in (highest, lowest, drawn(1), drawn(2), drawn(3)):
        try:
            if not outcome(text, pick, ((3, 1),)):
                return
        except (Deadlock, AssertionError):
            return
    pytest.fail(f"nobody noticed: {fault}")
