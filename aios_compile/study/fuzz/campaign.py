"""Run many examples and count: what each pass fired on, what failed, what was refused."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aios_compile.codegen.cpp import build
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE
from aios_compile.study.fuzz.example import (
    Compile,
    Example,
    FuzzFailure,
    Outcome,
    run_example,
)
from aios_compile.study.fuzz.generate import draw
from aios_compile.study.fuzz.names import check_names
from aios_compile.study.fuzz.patterns import PATTERNS
from aios_compile.study.fuzz.shrink import MAX_TRIALS, shrink, write_script

PASSES = tuple(info_of(p).name for p in PIPELINE)


def passes_of(target: str) -> tuple[str, ...]:
    """Return the passes that are planted and can fire on a target of this machine."""
    found = [info_of(p).name for p in PIPELINE if info_of(p).runs_on(target)]
    if not build.Target.host().bf16_dot:
        found = [name for name in found if name != "round_activations"]
    planted = {p.pass_name for p in PATTERNS}
    return tuple(name for name in found if name in planted)


Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A failing example: its number, what is wrong, and the script that shows it."""

    seed: int
    number: int
    message: str
    script: str


@dataclass
class Tally:
    """Counts over examples. fired: pass -> examples on which it rewrote something.

    numbers: of the first and the last example that was run.
    second_opinions: examples whose plain budget did not suffice. contexts: kinds of context.
    """

    target: str = "cpp"
    seed: int = 0
    numbers: tuple[int, int] = (0, -1)
    examples: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    contexts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    second_opinions: int = 0
    worst: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, example: Example, outcome: Outcome) -> None:
        """Count one example."""
        self.examples += 1
        self.fired.update(name for name, hits in outcome.hits.items() if hits)
        self.contexts.update(set(example.planted))
        self.second_opinions += outcome.second
        self.worst = max(self.worst, outcome.worst)
        if outcome.refused:
            self.refused[outcome.refused] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return what --json prints."""
        return {
            "target": self.target,
            "seed": self.seed,
            "numbers": self.numbers,
            "examples": self.examples,
            "seconds": round(self.seconds, 1),
            "fired": {name: self.fired[name] for name in PASSES},
            "contexts": dict(self.contexts.most_common()),
            "second_opinions": self.second_opinions,
            "worst_share_of_budget": self.worst,
            "refused": dict(self.refused.most_common()),
            "failures": self.failures,
        }


def run_campaign(
    numbers: Iterable[int],
    *,
    seed: int,
    objects: Path,
    scripts: Path,
    passes: Sequence[str] = (),
    ops: Sequence[str] = (),
    target: str = "cpp",
    seconds: float | None = None,
    say: Say = lambda text: None,
    compiler: Compile | None = None,
    max_failures: int = 5,
    max_trials: int = MAX_TRIALS,
) -> Tally:
    """Run the examples of `numbers` for at most `seconds`; shrink what fails to scripts.

    objects: keeps built kernels. compiler: instead of compile_graph (tests plant bugs with it).
    Ends early after `max_failures` failures. max_trials: examples tried while one is shrunk.
    """
    check_names(passes, ops)
    tally, begin = Tally(target, seed), time.monotonic()
    for number in numbers:
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        tally.numbers = (tally.numbers[0] if tally.examples else number, number)
        example = draw(seed, number, passes, ops, target)
        example = replace(example, setup=replace(example.setup, target=target))
        try:
            outcome = _outcome(example, objects, compiler)
            tally.add(example, outcome)
            if outcome.refused:
                say(f"example {number} is refused: {outcome.refused}")
        except FuzzFailure as failure:
            say(f"example {number}: {failure}")
            tally.examples += 1
            small, message = _shrunk(example, objects, compiler, str(failure), max_trials)
            path = write_script(small, message, scripts / f"fuzz_{seed}_{number}.py")
            tally.failures.append(Failure(seed, number, message, str(path)))
            say(f"example {number} is {path}")
            if len(tally.failures) >= max_failures:
                break
    tally.seconds = time.monotonic() - begin
    return tally


def _outcome(example: Example, objects: Path, compiler: Compile | None) -> Outcome:
    """Run an example; an exception that nobody raised on purpose is a failure too."""
    try:
        return run_example(example, objects, compiler)
    except FuzzFailure:
        raise
    except Exception as error:  # a crash of the compiler is what is looked for
        raise FuzzFailure(f"crash: {type(error).__name__}: {error}") from error


def _kind(message: str) -> list[str]:
    """Return what a smaller example must share: "wrong", "reverted: pass", "crash: error"."""
    return message.split(":")[: 1 if message.startswith("wrong") else 2]


def _shrunk(
    example: Example,
    objects: Path,
    compiler: Compile | None,
    message: str,
    max_trials: int,
) -> tuple[Example, str]:
    """Return the smallest failing example of the same kind, and its message."""
    kind = _kind(message)
    messages = {example: message}

    def fails(candidate: Example) -> bool:
        try:
            _outcome(candidate, objects, compiler)
        except FuzzFailure as failure:
            messages[candidate] = str(failure)
            return _kind(str(failure)) == kind
        return False

    small = shrink(example, fails, max_trials)
    return small, messages[small]
