"""n completions in one stream: each in order, each with one end, all as `generate` gives them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from aios_compile import AsyncEngine
from aios_compile.errors import EngineClosedError
from aios_compile.runtime.delivery import Delivery
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.outputs import CompletionOutput, StreamChunk
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeTokenizer

FIELDS: list[dict[str, Any]] = [
    {"temperature": 1.2},
    {"temperature": 1.0, "stop": ["t", "ab"], "logprobs": 1},
    {"temperature": 0.8, "min_tokens": 6, "stop_token_ids": [4, 5, 6, 7], "prompt_logprobs": 0},
]


def check(chunks: list[StreamChunk], outputs: list[CompletionOutput]) -> None:
    for want in outputs:
        own = [chunk for chunk in chunks if chunk.index == want.index]
        assert [t for c in own for t in c.token_ids] == want.token_ids
        assert "".join(c.text for c in own) == want.text
        reasons = [c.finish_reason for c in own]
        assert reasons[-1] == want.finish_reason and not any(reasons[:-1])
        if want.logprobs is not None:
            assert [row for c in own for row in c.logprobs or []] == want.logprobs
    assert {chunk.index for chunk in chunks} == {want.index for want in outputs}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("sizes", [{}, {"num_pages": 12, "max_num_batched_tokens": 5}])
def test_chunks_are_those_of_generate(
    fields: dict[str, Any], sizes: dict[str, int], make_engine: MakeEngine
) -> None:
    engine = make_engine(FakeTokenizer(), eos_token_ids=[9], **sizes)
    for seed in range(3):
        given = {"seed": seed, "n": 3, "max_tokens": 20, **fields}
        (expected,) = engine.generate([[3, 1, 4, 1, 5]], **given)
        assert len({tuple(o.token_ids) for o in expected.outputs}) > 1
        stream = engine.stream([3, 1, 4, 1, 5], **given)
        chunks = list(stream)
        check(chunks, expected.outputs)
        assert stream.output().outputs == expected.outputs
        assert stream.output().prompt_logprobs == expected.prompt_logprobs


def test_one_that_has_ended_does_not_end_the_stream(text_engine: Engine) -> None:
    stream = text_engine.stream([3, 1], n=2, max_tokens=30, temperature=1.0, seed=3, stop=["t"])
    first_end = next(chunk for chunk in stream if chunk.finish_reason)
    assert not stream.is_over
    rest = list(stream)
    assert rest[-1].finish_reason and {c.index for c in rest} == {1 - first_end.index}
    stream = text_engine.stream([3, 1], n=2, max_tokens=30, ignore_eos=True)
    next(stream)
    stream.close()
    end = time.monotonic() + 5
    while text_engine._core.requests:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_slow_reader_gets_each_in_turn() -> None:
    delivery = Delivery(indices=range(3))
    for token in range(4):
        delivery.put([StreamChunk("x", [token], index=i) for i in (0, 2)])
    seen = [delivery.take(True), delivery.take(True)]
    delivery.put([StreamChunk("y", [9], index=0), StreamChunk("y", [9], index=1)])
    seen += [delivery.take(True), delivery.take(True)]
    assert [(c.index, len(c.token_ids)) for c in seen] == [(0, 4), (2, 4), (1, 1), (0, 1)]
    assert delivery.take_nowait(True) is None
    delivery.finish([StreamChunk("", [], "stop", index=i) for i in range(3)])
    assert not delivery.is_over
    assert sorted(delivery.take(True).index for _ in range(3)) == [0, 1, 2] and delivery.is_over


def test_an_error_ends_all(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer())
    stream = engine.stream([3, 1], n=3, max_tokens=30, ignore_eos=True)
    next(stream)
    engine.close()
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_with_asyncio(text_engine: Engine) -> None:
    fields = {"n": 3, "seed": 5, "temperature": 1.1, "max_tokens": 15}
    (expected,) = text_engine.generate(["abc"], **fields)

    async def main() -> None:
        engine = AsyncEngine(text_engine)
        stream = engine.generate("abc", **fields)
        check([chunk async for chunk in stream], expected.outputs)
        assert stream.output().outputs == expected.outputs and not engine.num_open
        assert (await engine.result("abc", **fields)).outputs == expected.outputs

    asyncio.run(main())
