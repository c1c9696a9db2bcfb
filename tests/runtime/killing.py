"""Kill the engine's process at random moments; every request must end with the right tokens."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aios_compile.runtime.engine_front import EngineFront
from aios_compile.runtime.outputs import RequestOutput
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import FakeTokenizer


def fake_front(stall_s: float = 20.0, **options: Any) -> EngineFront:
    """Return the front of a process that runs the fake model."""
    command = [sys.executable, "-m", "tests.runtime.fake_child", "{socket}", "{epoch}"]
    return EngineFront([*command, json.dumps(options)], stall_s=stall_s)


def requests(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Return prompts and parameters for which the history matters."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [rng.randrange(36) for _ in range(rng.randint(1, 30))]
        found.append(
            (
                prompt,
                {
                    "seed": i,
                    "n": rng.choice([1, 1, 3]),
                    "temperature": rng.choice([0.0, 0.8, 1.4]),
                    "max_tokens": rng.randint(5, 30),
                    "repetition_penalty": rng.choice([1.0, 1.3]),
                    "stop": rng.choice([[], ["the", "ab"]]),
                    "min_tokens": rng.choice([0, 5]),
                    "logprobs": rng.choice([None, 2]),
                    "prompt_logprobs": rng.choice([None, None, 1]),
                },
            )
        )
    return found


def answers(asked: list[tuple[list[int], dict[str, Any]]]) -> list[RequestOutput]:
    """Return what an engine that nobody kills says."""
    engine = checked_engine(FakeTokenizer(), eos_token_ids=[9])
    outputs = [engine.generate([prompt], **fields)[0] for prompt, fields in asked]
    engine.close()
    return outputs


def run_while_killing(
    front: EngineFront,
    asked: list[tuple[list[int], dict[str, Any]]],
    expected: list[RequestOutput],
    num_kills: int,
    *,
    seed: int = 0,
    num_clients: int = 8,
    longest_life_s: float = 0.25,
    how: int = signal.SIGKILL,
    on_kill: Callable[[int], None] = lambda number: None,
) -> int:
    """Send requests round and round until num_kills processes were killed; return how many ended.

    Every stream's text, tokens and log-probabilities must equal those of `expected`.
    """
    over, errors, done = threading.Event(), [], []

    def client(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        try:
            while not over.is_set():
                i = rng.randrange(len(asked))
                prompt, fields = asked[i]
                stream = front.stream(prompt, **fields)
                chunks = list(stream)
                for want in expected[i].outputs:
                    own = [c for c in chunks if c.index == want.index]
                    assert [t for c in own for t in c.token_ids] == want.token_ids
                    assert "".join(c.text for c in own) == want.text
                    assert [c.finish_reason for c in own if c.finish_reason] == [want.finish_reason]
                assert stream.output().outputs == expected[i].outputs
                assert stream.output().prompt_logprobs == expected[i].prompt_logprobs
                done.append(i)
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            errors.append(error)
            over.set()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(num_clients)]
    for thread in threads:
        thread.start()
    rng, epoch = random.Random(seed), 0
    try:
        for number in range(num_kills):
            waits = 0  # not seconds: all of this may be stopped for minutes on a shared machine
            while front.epoch == epoch or front._outbox is None:
                assert waits < 15_000 and not over.is_set(), (waits, errors)
                waits += 1
                time.sleep(0.002)
            epoch, child = front.epoch, front.child
            time.sleep(rng.random() * longest_life_s)
            assert child is not None
            with suppress(ProcessLookupError):
                os.kill(child.process.pid, how)
            on_kill(number)
        time.sleep(0.1)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    assert not errors, errors
    return len(done)
