"""AsyncEngine on the example checkpoint: the same tokens as generate, from many tasks at once."""

from __future__ import annotations

import asyncio

import aios_compile
from aios_compile import AsyncEngine
from tests.serving.conftest import EXAMPLE, OPTIONS, PROMPTS


def test_concurrent_streams_equal_generate(example: aios_compile.CompiledModel) -> None:
    fields = {"max_tokens": 40, "temperature": 0.8, "seed": 5, "stop": ["\n\n"]}
    expected = [example.generate(prompt, **fields).outputs[0] for prompt in PROMPTS]

    async def main() -> None:
        engine = await AsyncEngine.load(EXAMPLE, max_waiting=64, **OPTIONS)
        async with engine:

            async def read(i: int) -> None:
                stream = engine.generate(PROMPTS[i], **fields)
                chunks = [chunk async for chunk in stream]
                assert "".join(c.text for c in chunks) == expected[i].text
                assert [t for c in chunks for t in c.token_ids] == expected[i].token_ids
                assert chunks[-1].finish_reason == expected[i].finish_reason

            async def leave(i: int) -> None:
                async for _ in engine.generate(PROMPTS[i], max_tokens=400):
                    return

            jobs = [read(i) for i in range(len(PROMPTS))]
            await asyncio.gather(*jobs, *(leave(i) for i in range(len(PROMPTS))))
            assert await engine.drain(timeout_s=10)
            pool = engine.model.engine._core.state.pool
            while pool.num_free < pool.num_pages - 1:  # aborted ones go with the next step
                await asyncio.sleep(0.001)
            text = engine.metrics().prometheus_text()
            assert 'aios_requests_finished_total{reason="abort"} 6' in text
        assert not engine.health().live

    asyncio.run(asyncio.wait_for(main(), 60))
