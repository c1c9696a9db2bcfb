"""A request that an engine left unfinished goes on in another one, to the last bit the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aios_compile.runtime.request import Progress
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeTokenizer

FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "repetition_penalty": 1.4, "frequency_penalty": 0.4, "logprobs": 2},
    {"temperature": 0.9, "stop": ["the", "ab "], "include_stop_str_in_output": True},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": [4, 5, 6, 7], "bad_words": ["an"]},
    {"temperature": 0.7, "prompt_logprobs": 1, "logprobs": 0, "stop": ["e", "t"]},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("sizes", [{}, {"max_num_batched_tokens": 5, "max_num_logit_rows": 5}])
def test_every_cut_ends_the_same(
    fields: dict[str, Any], sizes: dict[str, int], make_engine: MakeEngine
) -> None:
    engine = make_engine(FakeTokenizer(), eos_token_ids=[9], **sizes)
    rng = random.Random(2)
    for seed in range(4):
        prompt = [rng.randrange(36) for _ in range(rng.choice([1, 7, 20]))]
        given = {"seed": seed, "max_tokens": 24, **fields}
        stream = engine.stream(prompt, **given)
        chunks = list(stream)
        whole = stream.output()
        for cut in range(len(chunks)):
            before = chunks[:cut]
            logprobs = None
            if given.get("logprobs") is not None:
                logprobs = [row for c in before for row in c.logprobs or []]
            progress = Progress(
                [t for c in before for t in c.token_ids], sum(len(c.text) for c in before), logprobs
            )
            resumed = engine.open_stream(prompt, None, dict(given), progress=progress)
            after = list(resumed)
            left = chunks[cut:]
            assert "".join(c.text for c in after) == "".join(c.text for c in left)
            ids = [[t for c in part for t in c.token_ids] for part in (after, left)]
            assert ids[0] == ids[1]
            assert resumed.output().outputs == whole.outputs
            assert resumed.output().prompt_logprobs == whole.prompt_logprobs


def test_a_resumed_request_is_not_measured_as_a_new_one(make_engine: MakeEngine) -> None:
    engine = make_engine()
    list(engine.open_stream([1, 2], None, {"max_tokens": 6}, progress=Progress([3, 4, 5], 0)))
    metrics = engine.metrics()
    assert metrics.value("time_to_first_token_seconds", "_count") == 0
    assert metrics.value("inter_token_latency_seconds", "_count") == 3
    assert metrics.value("inter_token_latency_seconds", "_sum") < 5
    assert metrics.value("generation_tokens_total") == 3
