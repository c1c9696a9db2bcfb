"""Engines on the fake executor: poisoned pages, integrity checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aios_compile.runtime.engine import Engine
from aios_compile.runtime.events import Commit
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, limits

MakeEngine = Callable[..., Engine]


def checked_engine(tokenizer: Any = None, **options: Any) -> Engine:
    """Return an engine whose free pages are poisoned and whose laws are checked every event."""
    names = ("eos_token_ids", "defaults", "seed", "decision_sink", "options", "speculator")
    given = {name: options.pop(name) for name in names if name in options}
    executor = options.pop("executor", None) or FakeExecutor(limits(**options))
    engine = Engine(executor, tokenizer, **given)
    core = engine._core
    executor.free_pages = lambda: list(core.state.pool.free)
    advance = core._advance

    def checked(event: Any) -> Any:
        plan = advance(event)
        core.state.check_integrity()
        if isinstance(event, Commit) and not core.state.has_work:
            pool = core.state.pool
            assert pool.num_free + len(pool.withheld) == pool.num_pages - 1
        return plan

    core._advance = checked  # type: ignore[method-assign]
    return engine


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(tokenizer: Any = None, **options: Any) -> Engine:
        engines.append(checked_engine(tokenizer, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def text_engine(make_engine: MakeEngine) -> Engine:
    return make_engine(FakeTokenizer())
