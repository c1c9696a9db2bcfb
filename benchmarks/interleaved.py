"""Side by side on a noisy machine: in every round each takes its turn, and ratios are of pairs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.floors import Rates

REST_SECONDS = 0.01  # between turns: worker threads that still spin have gone to sleep


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

    for i in range(rounds):
        if i % 2 == 0:
            ours_turn()
        for name, peer in peers.items():
            theirs[name].append(_rested(peer))
        if i % 2:
            ours_turn()
    return {
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
