"""Stop strings, wherever the borders of tokens fall."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str], num_old: int) -> tuple[int, str] | None:
    """Return (position, stop string) of the earliest match that ends after text[:num_old].

    Of several at one position the first in `stops` wins. Only the new end is searched.
    """
    best: tuple[int, str] | None = None
    for stop in stops:
        position = text.find(stop, max(0, num_old - len(stop) + 1))
        if position >= 0 and (best is None or position < best[0]):
            best = (position, stop)
    return best


def num_held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters of text may still become a stop string."""
    held = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:size]):
                held = size
                break
    return held
