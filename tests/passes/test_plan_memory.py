"""The planner never lets two living buffers share a byte, and stays near the lower bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_compile.ir.lifetimes import Lifetime
from aios_compile.passes.plan_memory import ALIGNMENT, aligned, lower_bound, plan_memory

spans = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(1, 5000))


def lifetimes_of(rows: list[tuple[int, int, int]]) -> list[Lifetime]:
    return [
        Lifetime(f"b{i}", size, first, first + more) for i, (first, more, size) in enumerate(rows)
    ]


@given(st.lists(spans, max_size=25))
@settings(max_examples=200, deadline=None)
def test_living_buffers_never_share_a_byte(rows: list[tuple[int, int, int]]) -> None:
    items = lifetimes_of(rows)
    plan = plan_memory(items)
    for i, a in enumerate(items):
        assert plan.offsets[a.name] % ALIGNMENT == 0
        assert plan.offsets[a.name] + a.bytes <= plan.arena_bytes
        for b in items[i + 1 :]:
            if a.overlaps(b):
                x, y = plan.offsets[a.name], plan.offsets[b.name]
                assert x + a.bytes <= y or y + b.bytes <= x, (a, b)
    assert plan.lower_bound_bytes <= plan.arena_bytes <= plan.naive_bytes


def test_a_chain_needs_two_buffers() -> None:
    items = [Lifetime(f"b{i}", 1024, i, i + 1) for i in range(10)]
    plan = plan_memory(items)
    assert plan.arena_bytes == plan.lower_bound_bytes == 2048
    assert plan.naive_bytes == 10240


def test_a_shortened_lifetime_lets_buffers_collide() -> None:
    """The negative: with a wrong lifetime the plan is smaller than what is really alive."""
    items = [Lifetime("a", 640, 0, 3), Lifetime("b", 640, 1, 2), Lifetime("c", 640, 2, 3)]
    wrong = [Lifetime("a", 640, 0, 1), *items[1:]]
    assert plan_memory(wrong).arena_bytes < lower_bound(items)


@pytest.mark.parametrize(("size", "want"), [(1, 64), (64, 64), (65, 128)])
def test_sizes_are_rounded_to_cache_lines(size: int, want: int) -> None:
    assert aligned(size) == want
