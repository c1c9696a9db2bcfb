"""Random programs on a GPU: every kernel that they become against eager, in float64 and float32.

Shapes, strides, dtypes, masks and tails are drawn (study/fuzz); buffers are poisoned before each
launch. Processes side by side: most of the time is Triton's compiler.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu_clock import Clock

WORKERS = 12  # each has a context on the card
SECONDS = 100.0


def random_row(count: int, seed: int, clock: Clock) -> dict[str, Any]:
    """Run `count` random programs of a seed, as many as SECONDS allow; return what became of them.

    Raises AssertionError that names the programs that are wrong: `seed`, number and message.
    """
    if clock.cuda:
        workers = min(WORKERS, os.cpu_count() or 1, count)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            numbers = [range(first, count, workers) for first in range(workers)]
            parts = list(pool.map(partial(campaign, clock.device, seed), numbers))
    else:
        parts = [campaign(clock.device, seed, range(count))]
    failures = [failure for part in parts for failure in part["failures"]]
    assert not failures, failures
    refused: Counter[str] = sum((Counter(part["refused"]) for part in parts), Counter())
    return {
        "examples": sum(part["examples"] for part in parts), "seed": seed,
        "refused": dict(refused), "worst_share_of_budget": max(part["worst"] for part in parts),
        "fired": dict(sum((Counter(part["fired"]) for part in parts), Counter())),
    }  # fmt: skip


def campaign(device: str, seed: int, numbers: range) -> dict[str, Any]:
    """Run a process's share; nothing is shrunk, which would compile for minutes."""
    from aios_compile.runtime.torch_device import open_device
    from aios_compile.study.fuzz.campaign import run_campaign
    from aios_compile.study.fuzz.interpreted import interpret_graph

    folder = Path(tempfile.mkdtemp(prefix="aios-gpu-random-"))
    tally = run_campaign(
        numbers, seed=seed, objects=folder / "objects", scripts=folder, target="triton",
        seconds=SECONDS, compiler=partial(interpret_graph, device=open_device(device)),
        max_trials=0,
    )  # fmt: skip
    failures = [f"seed {f.seed} number {f.number}: {f.message}"[:400] for f in tally.failures]
    return {
        "examples": tally.examples, "refused": dict(tally.refused), "failures": failures,
        "worst": tally.worst, "fired": {k: v for k, v in tally.fired.items() if v},
    }  # fmt: skip
