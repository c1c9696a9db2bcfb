"""The example checkpoint in a process of its own, killed while it generates."""

from __future__ import annotations

import asyncio
import os
import signal

import aios_compile
from aios_compile import AsyncEngine
from tests.serving.conftest import EXAMPLE, OPTIONS, PROMPTS


def test_killed_twice_it_says_what_it_would_have_said(example: aios_compile.CompiledModel) -> None:
    fields = {"max_tokens": 150, "temperature": 0.8, "seed": 3, "repetition_penalty": 1.1}
    expected = [example.generate(prompt, logprobs=1, **fields).outputs for prompt in PROMPTS]
    speculation = {"method": "ngram", "prompt_lookup_min": 1}

    async def main() -> None:
        engine = await AsyncEngine.load(
            EXAMPLE, in_process=False, speculative_config=speculation, **OPTIONS
        )
        async with engine:
            num_tokens = 0

            async def read(i: int) -> None:
                nonlocal num_tokens
                stream = engine.generate(PROMPTS[i], logprobs=1, **fields)
                async for chunk in stream:  # a busy machine merges chunks
                    num_tokens += len(chunk.token_ids)
                assert stream.output().outputs == expected[i]

            async def kill() -> None:
                for wait_for in (60, 400):
                    while num_tokens < wait_for:
                        await asyncio.sleep(0.001)
                    os.kill(engine.model.child.process.pid, signal.SIGKILL)

            await asyncio.gather(kill(), *(read(i) for i in range(len(PROMPTS))))
            assert engine.model.epoch == 3

    asyncio.run(asyncio.wait_for(main(), 120))
