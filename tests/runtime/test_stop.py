"""Stop strings: across tokens, held back, cut, included."""

from __future__ import annotations

import random

import pytest

from aios_compile.runtime.output_text import OutputText
from aios_compile.runtime.stop import find_stop, num_held_back
from tests.runtime.fake_executor import FakeTokenizer

CODEC = FakeTokenizer()


def feed(
    pieces: list[str], stops: list[str], include: bool = False, min_tokens: int = 0
) -> tuple[str, str | None, str]:
    """Return (text, stop, what a stream had shown before the end)."""
    text = OutputText(CODEC, stops, include)
    ids = [i for piece in pieces for i in CODEC.encode(piece)]
    stop = None
    for count, token in enumerate(ids, start=1):
        shown = text.text[: text.num_released]
        stop = text.append(token, can_stop=count > min_tokens)
        assert text.text[: text.num_released].startswith(shown), "shown text changed"
        if stop is not None:
            break
    text.finish(None)
    assert text.num_released == len(text.text)
    assert text.text.startswith(shown)
    return text.text, stop, shown


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stop"),
    [
        (["a", "b", "c", "d"], ["bc"], "a", "bc"),
        (["x", "abc"], ["xab"], "", "xab"),
        (["a", "b"], ["bz"], "ab", None),
        (["the", "an"], ["ea"], "th", "ea"),
        (["a", "a", "a", "b"], ["aab"], "a", "aab"),
        (["and "], ["d", "n"], "a", "n"),  # the earliest place wins, not the first in the list
        (["a", "b"], ["b", "ab"], "", "ab"),
        (["é", "a"], ["éa"], "", "éa"),
        (["a", "b", "c"], ["abc", "b"], "a", "b"),
    ],
)
def test_stops(pieces: list[str], stops: list[str], text: str, stop: str | None) -> None:
    assert feed(pieces, stops)[:2] == (text, stop)


def test_include_keeps_the_stop_string_and_cuts_after_it() -> None:
    assert feed(["a", "and "], ["n"], include=True)[:2] == ("aan", "n")


def test_min_tokens_delays_stop_strings() -> None:
    assert feed(["b", "c", "b"], ["b"], min_tokens=1)[:2] == ("bc", "b")
    assert feed(["b", "c"], ["bc"], min_tokens=1)[:2] == ("", "bc")


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    assert feed(["a", "b", "c"], ["bcx"])[2] == "a"
    assert num_held_back("xx<en", ["<end>", "en."]) == 3
    assert num_held_back("abc", []) == num_held_back("abc", ["x"]) == 0
    assert num_held_back("<end>", ["<end>"]) == 0


def test_against_the_plain_definition() -> None:
    """On random texts, the cut is at the first place where any stop string is complete."""
    rng = random.Random(0)
    for _ in range(500):
        pieces = [rng.choice("abc") for _ in range(12)]
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text, stop, _ = feed(pieces, stops)
        whole = "".join(pieces)
        ends = [whole.find(s) + len(s) for s in stops if s in whole]
        if not ends:
            assert (text, stop) == (whole, None)
            continue
        seen = whole[: min(ends)]
        assert stop is not None and seen.endswith(stop)
        assert find_stop(seen, stops, 0) is not None
        assert text == seen[: min(seen.find(s) for s in stops if s in seen)]
