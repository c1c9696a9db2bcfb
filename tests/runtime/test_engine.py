"""Requests through the whole runtime: an answer never depends on its neighbours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_compile.errors import ConfigError
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.events import Preempt
from aios_compile.runtime.outputs import RequestOutput
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine, checked_engine
from tests.runtime.fake_executor import FakeTokenizer, greedy, limits, logits_after

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def random_requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        fields: dict[str, Any] = {
            "max_tokens": rng.randint(1, 12),
            "seed": rng.getrandbits(64),
            "temperature": rng.choice([0.0, 0.7, 1.0, 2.0]),
            "logprobs": rng.choice([None, 0, 3]),
            "prompt_logprobs": rng.choice([None, None, 2]),
            "n": rng.choice([1, 1, 3]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "frequency_penalty": rng.choice([0.0, 0.5]),
            "top_k": rng.choice([0, 5]),
            "min_tokens": rng.choice([0, 1]),
            "stop_token_ids": [rng.randrange(50)],
            "logit_bias": rng.choice([None, {7: 2.0}]),
            "stop": rng.choice([None, "a", ["th", ", "]]),
            "bad_words": rng.choice([None, ["e"], ["the an"]]),
        }
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 20))]
        requests.append((prompt, SamplingParams(**fields)))
    return requests


def summary(output: RequestOutput) -> tuple[object, ...]:
    """Everything but the number and the times."""
    return (output.prompt_token_ids, output.prompt_logprobs, output.outputs)


def run_alone(requests: list[tuple[list[int], SamplingParams]]) -> list[tuple[object, ...]]:
    engine = checked_engine(FakeTokenizer(), max_num_batched_tokens=64, max_num_logit_rows=64)
    try:
        return [summary(engine.generate([p], params)[0]) for p, params in requests]
    finally:
        engine.close()


def test_greedy_equals_the_model(make_engine: MakeEngine) -> None:
    output = make_engine().generate([PROMPT], temperature=0, max_tokens=20)[0]
    assert output.outputs[0].token_ids == greedy(PROMPT, 20)
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.queue_us is not None and output.metrics.ttft_us is not None
    assert 0 <= output.metrics.queue_us <= output.metrics.ttft_us
    assert output.metrics.ttft_us <= output.metrics.total_us
    assert output.prompt is None and output.text == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1, "max_num_logit_rows": 1},
        {"max_num_batched_tokens": 3, "max_num_seqs": 3, "max_num_logit_rows": 3},
        {"max_num_batched_tokens": 5},
        {"page_size": 1, "max_pages_per_sequence": 64},
        {"page_size": 16, "num_pages": 12},
        {"num_pages": 10},  # 9 pages of 4: preempts all the time
        {"token_buckets": (1, 2, 4, 8, 16)},
        {"token_buckets": (96,)},
    ],
    ids=str,
)
def test_mixed_batches_equal_single_runs(changes: dict[str, Any]) -> None:
    requests = random_requests(1, 24)
    expected = run_alone(requests)
    engine = checked_engine(FakeTokenizer(), **changes)
    outputs = engine.generate([p for p, _ in requests], [params for _, params in requests])
    stats = engine.stats
    engine.close()
    assert [summary(output) for output in outputs] == expected
    assert (stats.num_preemptions > 0) == (changes.get("num_pages") == 10)


def test_preemption_at_every_step_is_invisible() -> None:
    """R4: tokens, logprobs, text and reasons are the same, whatever step loses its pages."""
    requests = random_requests(2, 5)
    expected = run_alone(requests)
    num_steps, step = 1, 0
    while step < num_steps:
        engine = checked_engine(FakeTokenizer())
        core, plain = engine._core, engine._core.step

        def preempting(core: Any = core, plain: Any = plain, step: int = step) -> None:
            if core.stats.num_steps == step:
                for sequence in list(core.state.running):
                    core._advance(Preempt(sequence.sequence_id))
            plain()

        core.step = preempting  # type: ignore[method-assign]
        outputs = engine.generate([p for p, _ in requests], [params for _, params in requests])
        num_steps = engine.stats.num_steps
        engine.close()
        assert [summary(output) for output in outputs] == expected, f"preempted at step {step}"
        step += 1
    assert num_steps > 8


def test_a_pool_full_of_samples_makes_progress() -> None:
    params = SamplingParams(n=6, max_tokens=20, seed=5)
    expected = run_alone([(PROMPT, params)])
    engine = checked_engine(FakeTokenizer(), num_pages=9)
    output = engine.generate([PROMPT], params)[0]
    assert engine.stats.num_preemptions > 0 and output.metrics.num_preemptions > 0
    engine.close()
    assert summary(output) == expected[0]


def test_n_samples_differ_and_the_first_is_that_of_n_1(make_engine: MakeEngine) -> None:
    engine = make_engine()
    many = engine.generate([PROMPT], n=4, seed=9, max_tokens=12)[0].outputs
    assert [o.index for o in many] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in many}) == 4
    assert engine.generate([PROMPT], seed=9, max_tokens=12)[0].outputs == many[:1]


def test_seeds(make_engine: MakeEngine) -> None:
    def run(engine: Engine, **fields: Any) -> list[int]:
        return engine.generate([PROMPT], max_tokens=12, **fields)[0].outputs[0].token_ids

    first, second = make_engine(seed=1), make_engine(seed=1)
    one, two = run(first), run(first)
    assert one != two, "requests without a seed differ"
    assert [run(second), run(second)] == [one, two], "and repeat with the engine's seed"
    assert run(make_engine(seed=2)) != one
    assert run(first, seed=4) == run(second, seed=4) != run(first, seed=5)


def test_prompt_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer())
    output = engine.generate([PROMPT], prompt_logprobs=2, max_tokens=1, n=2)[0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    for i, entry in enumerate(output.prompt_logprobs[1:], start=1):
        raw = logits_after(PROMPT[:i], 50).astype(np.float64)
        expected = raw - np.log(np.sum(np.exp(raw)))
        assert entry is not None and next(iter(entry)) == PROMPT[i]
        assert entry[PROMPT[i]].logprob == pytest.approx(expected[PROMPT[i]], abs=1e-5)
        assert entry[PROMPT[i]].rank == 1 + int(np.sum(expected > expected[PROMPT[i]]))
        best = int(np.argmax(expected))
        assert entry[best].rank == 1 and 2 <= len(entry) <= 3
        assert entry[best].decoded_token == FakeTokenizer().decode([best])


def test_logits_of_one_sequence(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tokens = [i % 50 for i in range(64)]  # max_model_len, in chunks of 8 rows
    logits = engine.logits(tokens)
    assert logits.shape == (64, 50) and logits.dtype == np.float32
    for i in range(64):
        assert np.array_equal(logits[i], logits_after(tokens[: i + 1], 50))
    assert engine.logits(np.array([7])).shape == (1, 50)
    assert engine._core.executor.max_rows == 8  # type: ignore[attr-defined]
    assert not engine._core.state.has_work


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_sequence_lengths_survive_chunks_and_preemption(
    make_engine: MakeEngine, num_tokens: int
) -> None:
    """Dynamic RoPE looks at the whole prompt, however it is cut, and then at each position."""
    engine = make_engine(max_num_batched_tokens=num_tokens)
    seen: dict[int, set[int]] = {}

    def watch(batch: Any) -> None:
        for position, length in zip(batch.positions.tolist(), batch.sequence_lengths.tolist()):
            seen.setdefault(position, set()).add(length)

    engine._core.executor.before_step = watch  # type: ignore[attr-defined]
    plain = engine._core.step

    def preempting() -> None:
        if engine._core.stats.num_steps == 20 // num_tokens:
            engine._core._advance(Preempt(0))
        plain()

    engine._core.step = preempting  # type: ignore[method-assign]
    engine.generate([PROMPT], max_tokens=20)
    assert engine.stats.num_preemptions == 1
    assert seen == {i: {max(len(PROMPT), i + 1)} for i in range(len(PROMPT) + 19)}


def test_stream_equals_generate(text_engine: Engine) -> None:
    for seed in range(8):
        fields: dict[str, Any] = {"seed": seed, "max_tokens": 30, "stop": ["the", "ab"]}
        whole = text_engine.generate(["the cat"], **fields)[0]
        stream = text_engine.stream("the cat", **fields)
        chunks = list(stream)
        assert "".join(c.text for c in chunks) == whole.text
        assert [t for c in chunks for t in c.token_ids] == whole.outputs[0].token_ids
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.outputs[0].finish_reason
        assert all(c.text for c in chunks[:-1]), "no empty chunk but the last"
        assert stream.output().text == whole.text and list(stream) == []


def test_stream_never_gives_half_a_character(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer(), vocab_size=36)
    both = [i for i, piece in enumerate(FakeTokenizer.PIECES) if not piece.isascii()]
    assert len(both) == 2
    for seed in range(5):
        fields: dict[str, Any] = {
            "seed": seed,
            "max_tokens": 40,
            "logit_bias": dict.fromkeys(both, 4),
        }
        chunks = list(engine.stream("a", **fields))
        ids = [t for c in chunks for t in c.token_ids]
        assert "".join(c.text for c in chunks) == FakeTokenizer().decode(ids)
        assert any("é" in c.text for c in chunks)


def test_stream_without_a_tokenizer_gives_ids(make_engine: MakeEngine) -> None:
    chunks = list(make_engine().stream(PROMPT, temperature=0, max_tokens=6))
    assert [t for c in chunks for t in c.token_ids] == greedy(PROMPT, 6)
    assert all(c.text == "" for c in chunks)


def test_max_model_len_ends_with_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for wanted in (None, 1000, 4):
        output = engine.generate([[1] * 60], max_tokens=wanted)[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_a_decision_log_has_one_writer(tmp_path: Path) -> None:
    """Two engines that were given one path wrote into one file, which no replay could read."""
    sink = tmp_path / "log"
    first = checked_engine(decision_sink=sink)
    first.generate([[1]], max_tokens=2)
    written = sink.read_bytes()
    with pytest.raises(ConfigError, match="another engine writes into it"):
        checked_engine(decision_sink=sink)
    assert sink.read_bytes() == written
    first.close()
    checked_engine(decision_sink=sink).close()  # begun anew
    assert sink.read_bytes() != written
    with pytest.raises(ConfigError, match=r"decision_log='.*nowhere/log': No such file"):
        checked_engine(decision_sink=tmp_path / "nowhere" / "log")


def test_the_decision_log_replays(tmp_path: Path) -> None:
    from aios_compile.runtime.decisions import read_log
    from aios_compile.runtime.scheduler import replay

    sink = tmp_path / "decisions.jsonl"
    engine = checked_engine(FakeTokenizer(), num_pages=10, decision_sink=sink)
    requests = random_requests(3, 12)
    engine.generate([p for p, _ in requests], [params for _, params in requests])
    engine.close()
    events, decisions = read_log(sink)
    assert replay(limits(num_pages=10), events) == decisions
    assert {"admit", "chunk", "decode", "preempt", "finish"} <= {d.kind for d in decisions}
    assert decisions[-50:] == list(engine.log.ring)[-50:]
