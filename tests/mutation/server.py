"""Run mutants: a process that has torch and pytest imported is forked for each.

A child imports the project with the mutant in it, runs the tests that run the mutated statement and
stops at the first that fails. It is killed (the mutant as well) when a test takes much longer than
it did, or when it takes the machine's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import areas, overlay
from tests.mutation.operators import Mutant

PRELOADED = (
    "torch", "torch.export", "torch._dynamo", "torch._functorch.aot_autograd", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "triton", "triton.language", "hypothesis", "networkx", "safetensors.torch", "tokenizers",
    "typer", "rich.table", "msgpack",
)  # fmt: skip
MEMORY_BYTES = 8 << 30
TOO_LONG = (signal.SIGALRM, signal.SIGPROF, signal.SIGKILL)  # SIGKILL: too much memory
# A test may compute for so long, plus so many times its own time. On the clock it may take ten
# times that: the machine may be busy, and compilers that it starts are not counted.
SLACK_SECONDS, SLOWER, ON_THE_CLOCK = 10.0, 8.0, 10.0


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "killed", "timeout" (killed too) or "survived"; by which test."""

    mutant: Mutant
    outcome: str
    test: str
    num_tests: int
    seconds: float


def preload() -> None:
    """Import what is not mutated and takes seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        __import__(name)
    assert not [name for name in sys.modules if name.split(".")[0] == "aios_compile"]


def run(mutant: Mutant, tests: dict[str, float]) -> Verdict:
    """Run one mutant in a child process, against `tests` in this order; values: their seconds."""
    if not tests:
        return Verdict(mutant, "survived", "", 0, 0.0)
    begin = time.monotonic()
    aside = Path(tempfile.mkdtemp(prefix="mutant-"))
    child = os.fork()
    if not child:
        _child(mutant, tests, aside)
    try:
        status = _wait(child)
        notes = _notes(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    took = round(time.monotonic() - begin, 2)
    test = notes.get("test", "")
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in TOO_LONG
        return Verdict(mutant, "timeout" if late else "killed", test, notes.get("number", 0), took)
    code = os.waitstatus_to_exitcode(status)
    outcome = "survived" if code == 0 else "killed"
    return Verdict(mutant, outcome, test if code else "", notes.get("number", 0), took)


def _wait(child: int) -> int:
    """Return the child's status; end it, and what it started, when it takes too much memory."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if _resident_bytes(child) > MEMORY_BYTES:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status


def _resident_bytes(process: int) -> int:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * resource.getpagesize()


def _notes(aside: Path) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads((aside / "notes").read_text())
    except (OSError, ValueError):
        return {}
    return notes


def _child(mutant: Mutant, tests: dict[str, float], aside: Path) -> None:
    """Run the tests with the mutant and end this process; 0 if none noticed it."""
    status = 1
    try:
        os.setsid()
        quiet = os.open(aside / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(areas.ROOT)
        overlay.install(mutant.file, str(mutant.number), str(aside / "headers"))
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=no"]
        options += [f"--basetemp={aside / 'tests'}", "--continue-on-collection-errors"]
        status = int(pytest.main([*options, *tests], plugins=[_Watch(tests, aside / "notes")]))
        status = 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status
    finally:
        os._exit(status)


class _Watch:
    """Notes which test runs, and lets the process die of a test that takes too long."""

    def __init__(self, seconds: dict[str, float], notes: Path) -> None:
        self.seconds, self.notes, self.number = seconds, notes, 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the order that was asked for, whatever fixtures would like."""
        places = {name: i for i, name in enumerate(self.seconds)}
        items.sort(key=lambda item: places.get(item.nodeid, len(places)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.number += 1
        self.notes.write_text(json.dumps({"test": item.nodeid, "number": self.number}))
        limit = SLACK_SECONDS + SLOWER * self.seconds.get(item.nodeid, 1.0)
        self._limit(limit)
        try:
            return (yield)
        finally:
            self._limit(0.0)

    def _limit(self, seconds: float) -> None:
        for timer, name, factor in (
            (signal.ITIMER_PROF, signal.SIGPROF, 1.0),
            (signal.ITIMER_REAL, signal.SIGALRM, ON_THE_CLOCK),
        ):
            signal.signal(name, signal.SIG_DFL)  # ends also a kernel that never returns
            signal.setitimer(timer, factor * seconds)
