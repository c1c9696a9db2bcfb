"""Side by side on a noisy machine: in every round each takes its turn, and ratios are of pairs."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.floors import Rates

REST_SECONDS = 0.01  # between turns: worker threads that still spin have gone to sleep


class OtherWork:
    """How many cores other programs keep busy, between two calls of `cores`."""

    def __init__(self) -> None:
        self._last = self._now()

    def cores(self) -> float:
        """Return the mean number of cores that others used since the last call (Linux; else 0)."""
        last, self._last = self._last, self._now()
        clock, busy, own = (b - a for a, b in zip(last, self._last))
        return max(0.0, busy - own) / max(clock, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = time.process_time()
        try:
            fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        except OSError:
            return time.perf_counter(), own, own
        user, nice, system, _, _, irq, soft, steal = map(int, fields)
        busy = user + nice + system + irq + soft + steal
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), own


def median_and_spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compare(
    ours: Callable[[], float],
    peers: Mapping[str, Callable[[], float]],
    rates: Callable[[], Rates],
    floor: Callable[[Rates], float],
    rounds: int,
) -> dict[str, Any]:
    """Return seconds of ours and of each peer, floor / ours and peer / ours, over `rounds` rounds.

    Each callable returns seconds. The machine's rates are taken before and after ours and the
    better of the two count, so that a busy moment at the probe never flatters a share. Even rounds
    run ours first, odd ones the peers.
    """
    times: list[float] = []
    floors: list[float] = []
    shares: list[float] = []
    found: list[Rates] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}

    def ours_turn() -> None:
        before = _rested(rates)
        seconds = _rested(ours)
        found.append(before.better(_rested(rates)))
        best = floor(found[-1])
        times.append(seconds)
        floors.append(best)
        shares.append(best / seconds)

    others, disturbed = OtherWork(), []
    for i in range(rounds):
        if i % 2 == 0:
            ours_turn()
        for name, peer in peers.items():
            theirs[name].append(_rested(peer))
        if i % 2:
            ours_turn()
        disturbed.append(others.cores())
    return {
        "cores_busy_with_other_work": median_and_spread(disturbed),
        "rounds": rounds,
        "seconds": median_and_spread(times),
        "rates": {
            field.name: statistics.median(getattr(r, field.name) for r in found)
            for field in dataclasses.fields(Rates)
        },
        "floor_seconds": statistics.median(floors),
        "share": median_and_spread(shares),
        "peers": {
            name: {
                "seconds": median_and_spread(values),
                "ratio": median_and_spread([b / a for a, b in zip(times, values)]),
            }
            for name, values in theirs.items()
        },
    }


def _rested(call: Callable[[], Any]) -> Any:
    time.sleep(REST_SECONDS)
    return call()
