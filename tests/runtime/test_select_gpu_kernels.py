"""select_kernels on a device: a clock that obeys a table decides, as it would on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from aios_compile.codegen.kernel_choices import STANDARD, KernelChoices
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.example_steps import equal_sequences, pages_of
from aios_compile.runtime.select_gpu_kernels import Range, Selection, select_on_device

RANGES = {
    "qkv": Range("linear 1x4096x1024", 16, "base", ("a", "b")),
    "down": Range("linear 1x1024x3072", 16, "base", ("a",)),
}


@dataclass
class FakeGraph:
    names: Mapping[str, str]

    def replay(self) -> None:
        raise AssertionError("the step runs it")


class FakeStep:
    """A step of 1,000 us, more or less by what `gains` says of (kernel, candidate)."""

    def __init__(self, tokens: int, gains: Mapping[tuple[str, str], float], noise: float) -> None:
        self.tokens, self._gains, self._noise = tokens, gains, noise
        self._rng, self.seconds, self.drift = np.random.default_rng(tokens), 0.0, 0.0
        self.wrong: set[str] = set()
        self.failing: set[str] = set()
        self.spoilt = 0.0  # microseconds more with two candidates at once

    def ranges(self) -> Mapping[str, Range]:
        return RANGES

    def graph(self, names: Mapping[str, str]) -> FakeGraph:
        self.seconds += 0.01
        if self.failing & set(names.values()):
            raise RuntimeError("out of resource: shared memory")
        return FakeGraph(dict(names))

    def bits(self, graph: Any) -> bytes:
        return b"other" if self.wrong & set(graph.names.values()) else b"same"

    def micros(self, graph: Any) -> float:
        self.seconds += 0.001
        self.drift += 0.5  # the card gets warmer
        gain = sum(self._gains.get(item, 0.0) for item in graph.names.items())
        worse = self.spoilt if len(graph.names) > 1 else 0.0
        return (1000 - gain + worse + self.drift) * self._rng.normal(1, self._noise)


def selected(*steps: FakeStep, seconds: float = 60.0) -> Selection:
    makers = [lambda step=step: step for step in steps]
    return select_on_device(makers, seconds, lambda: sum(step.seconds for step in steps))


def test_the_clock_decides_for_each_kernel_and_bucket() -> None:
    """1 % of a step is seen among drift and noise of 0.2 %; what is best goes into the ledger."""
    gains = {("qkv", "a"): 10.0, ("qkv", "b"): 30.0, ("down", "a"): 20.0}
    found = selected(FakeStep(1, gains, 0.002), FakeStep(16, {}, 0.002))
    choices = found.choices
    assert choices.buckets == (1,)
    assert choices.chosen == {"qkv": ("b", STANDARD), "down": ("a", STANDARD)}
    assert [choices.name_of("qkv", tokens) for tokens in (1, 2, 400)] == ["b", STANDARD, STANDARD]
    assert choices.name_of("head", 1) == STANDARD
    best = next(t for t in choices.trials if (t.tokens, t.kernel, t.candidate) == (1, "qkv", "b"))
    assert best.chosen and best.speedup == pytest.approx(1000 / 970, rel=5e-3)
    assert sum(t.chosen for t in choices.trials) == 2 and len(choices.trials) == 6
    assert any("all that are chosen" in note and "chosen" in note for note in choices.notes)
    assert KernelChoices.from_json(choices.to_json()) == choices
    assert set(found.entries) == {r.signature for r in RANGES.values()}
    entry = found.entries["linear 1x4096x1024"]["16"]  # of the later step: the standard is best
    assert (entry.choice, entry.speedup, entry.tokens) == ("base", 1.0, 16) and entry.rounds >= 9


def test_noise_chooses_nothing() -> None:
    chosen = 0
    for seed in range(30):
        chosen += sum(t.chosen for t in selected(FakeStep(seed + 1, {}, 0.02)).choices.trials)
    assert chosen <= 2, "of 90 trials"


def test_what_differs_or_does_not_run_is_not_used_however_fast_it_is() -> None:
    step = FakeStep(4, {("qkv", "b"): 500.0, ("qkv", "a"): 40.0, ("down", "a"): 30.0}, 0.001)
    step.wrong = {"b"}
    found = selected(step).choices
    assert found.chosen == {"qkv": ("a",), "down": ("a",)}
    assert "4 tokens: qkv: b is not used, its results differ" in found.notes
    step.failing, step.seconds = {"a"}, 0.0
    found = selected(step).choices
    assert not found.chosen and not found.trials
    assert any("a does not run: RuntimeError: out of resource" in note for note in found.notes)


def test_what_is_slower_together_is_not_chosen_together() -> None:
    step = FakeStep(1, {("qkv", "b"): 30.0, ("down", "a"): 20.0}, 0.001)
    step.spoilt = 80.0
    found = selected(step)
    assert found.choices.chosen == {"qkv": ("b",)}, "the best one stays"
    assert found.entries["linear 1x1024x3072"]["16"].choice == "base"


def test_the_budget_is_kept() -> None:
    """Graphs and rounds take time: with little the first of each kernel, with none nothing."""
    gains = {("qkv", "b"): 30.0, ("qkv", "a"): 20.0, ("down", "a"): 20.0}
    for seconds, most in ((0.0, 0), (0.05, 2), (0.1, 3)):
        steps = [FakeStep(1, gains, 0.001)]
        found = selected(*steps, seconds=seconds)
        assert len(found.choices.trials) <= most
        assert steps[0].seconds <= seconds + 0.06, "a graph and a few rounds more at most"
        told = any("time" in note or "tried" in note for note in found.choices.notes)
        assert told or len(found.choices.trials) == 3


def test_sequences_share_what_they_read_and_own_what_they_write() -> None:
    limits = Limits(64, 8, 8, 12, 40, 16, 192, 1000)
    for sequences, context, new in ((1, 1, 1), (8, 100, 1), (4, 97, 1), (1, 64, 64), (2, 40, 20)):
        batch = equal_sequences(limits, sequences, context, new)
        assert len(batch.token_ids) == sequences * new == len(set(batch.slots.tolist()))
        assert batch.slots.min() >= limits.page_size, "not the trash page"
        pages = batch.slots // limits.page_size
        assert pages.max() < pages_of(limits, sequences, context, new) <= limits.num_pages
        read = batch.page_tables[:, : (context - new) // limits.page_size]
        assert not set(read.ravel().tolist()) & set(pages.tolist())
        assert (batch.context_lengths == context).all()
