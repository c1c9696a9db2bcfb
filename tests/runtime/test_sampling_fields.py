"""Every sampling parameter changes what it should, end to end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from aios_compile.runtime.engine import Engine
from aios_compile.runtime.outputs import CompletionOutput
from aios_compile.runtime.penalties import PenaltyCounts
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeTokenizer, greedy, logits_after

PROMPT = [8, 6, 7, 5, 3]


def run(engine: Engine, **fields: Any) -> CompletionOutput:
    fields = {"temperature": 0, "max_tokens": 16, **fields}
    return engine.generate([PROMPT], **fields)[0].outputs[0]


def test_top_k_top_p_and_min_p_narrow_the_choice(text_engine: Engine) -> None:
    best = greedy(PROMPT, 16)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert run(text_engine, temperature=3.0, seed=1, **narrow).token_ids == best, narrow
    assert run(text_engine, temperature=3.0, seed=1).token_ids != best


def test_allowed_token_ids(text_engine: Engine) -> None:
    output = run(text_engine, allowed_token_ids=[4, 9, 11], temperature=1.0, seed=2)
    assert set(output.token_ids) <= {4, 9, 11}


def test_logit_bias(text_engine: Engine) -> None:
    assert set(run(text_engine, logit_bias={13: 100}).token_ids) == {13}
    best = greedy(PROMPT, 1)[0]
    assert run(text_engine, logit_bias={best: -100}, max_tokens=1).token_ids != [best]


def test_penalties(text_engine: Engine) -> None:
    # the bias alone repeats one token for ever; each penalty breaks it up
    biased = {"logit_bias": {13: 7}}
    assert run(text_engine, **biased).token_ids == [13] * 16
    for penalty in (
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0, "logit_bias": {13: 6}},
        {"frequency_penalty": 1.0},
    ):
        assert run(text_engine, **{**biased, **penalty}).token_ids.count(13) < 14, penalty


def test_repetition_penalty_looks_at_the_prompt_and_the_others_do_not() -> None:
    repetition = PenaltyCounts([5, 6, 5], SamplingParams(repetition_penalty=1.1))
    assert (repetition.ids.tolist(), repetition.counts.tolist()) == ([5, 6], [0, 0])
    frequency = PenaltyCounts([5, 6, 5], SamplingParams(frequency_penalty=1.1))
    for token in [6, 7, 6] + list(range(100, 300)):
        repetition.add(token)
        frequency.add(token)
    assert repetition.ids.tolist()[:3] == [5, 6, 7]
    assert repetition.counts.tolist()[:3] == [0, 2, 1] and len(repetition.ids) == 203
    assert frequency.ids.tolist()[:2] == [6, 7] and frequency.counts.tolist()[:2] == [2, 1]


def test_eos_ignore_eos_and_min_tokens(make_engine: MakeEngine) -> None:
    tokens = greedy(PROMPT, 16)
    eos = tokens[3]
    first = tokens.index(eos)
    engine = make_engine(FakeTokenizer(), eos_token_ids=[eos])
    output = run(engine)
    assert (output.token_ids, output.finish_reason) == (tokens[: first + 1], "stop")
    assert output.stop_reason is None
    assert output.text == FakeTokenizer().decode(tokens[:first])
    assert run(engine, ignore_eos=True).token_ids == tokens
    later = run(engine, min_tokens=first + 2)
    assert eos not in later.token_ids[: first + 2] and len(later.token_ids) >= first + 2


def test_stop_token_ids(text_engine: Engine) -> None:
    tokens = greedy(PROMPT, 16)
    stop = tokens[5]
    end = tokens.index(stop)
    output = run(text_engine, stop_token_ids=[stop])
    assert (output.token_ids, output.stop_reason) == (tokens[: end + 1], stop)
    assert output.text == FakeTokenizer().decode(tokens[:end])
    shown = run(text_engine, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert shown.text == FakeTokenizer().decode(tokens[: end + 1])
    assert len(run(text_engine, stop_token_ids=[stop], min_tokens=16).token_ids) == 16


def test_stop_strings_wait_for_min_tokens(text_engine: Engine) -> None:
    text = FakeTokenizer().decode(greedy(PROMPT, 16))
    early = run(text_engine, stop=text[0])
    assert (early.text, early.stop_reason, len(early.token_ids)) == ("", text[0], 1)
    assert run(text_engine, stop=text[0], include_stop_str_in_output=True).text == text[0]
    later = run(text_engine, stop=text[0], min_tokens=4)
    assert len(later.token_ids) > 4 and later.text.startswith(text[0])


def test_bad_words(text_engine: Engine) -> None:
    def pairs(ids: list[int]) -> set[tuple[int, int]]:
        return set(pairwise(ids))

    codec = FakeTokenizer()
    loop = {"logit_bias": {2: 9, 3: 8.9}, "temperature": 1.0, "seed": 3, "max_tokens": 40}
    b, c = codec.encode("b")[0], codec.encode("c")[0]
    assert (b, c) == (2, 3)
    assert {(b, c), (c, b)} <= pairs(run(text_engine, **loop).token_ids)
    assert b not in run(text_engine, **loop, bad_words=["b"]).token_ids
    banned = run(text_engine, **loop, bad_words=["cb"]).token_ids
    assert codec.encode("cb") == [c, b] and (c, b) not in pairs(banned) and b in banned


def test_a_ban_beats_the_bias_of_the_same_token(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer(), eos_token_ids=[13])
    biased: dict[str, Any] = {"logit_bias": {13: 100, 2: 50}, "max_tokens": 6}
    assert run(engine, **biased).token_ids == [13]
    assert run(engine, **biased, min_tokens=3).token_ids == [2, 2, 2, 13]
    without = run(engine, **biased, min_tokens=3, bad_words=["b"]).token_ids
    assert 2 not in without and without[-1] == 13


def test_logprobs(text_engine: Engine) -> None:
    output = run(text_engine, logprobs=3, max_tokens=5)
    assert output.logprobs is not None and len(output.logprobs) == 5
    tokens, total = list(PROMPT), 0.0
    for token, entry in zip(output.token_ids, output.logprobs):
        raw = logits_after(tokens, 50).astype(np.float64)
        expected = raw - np.log(np.sum(np.exp(raw)))
        order = np.argsort(-expected)[:3].tolist()
        assert list(entry) == order and token == order[0]
        assert [entry[t].rank for t in order] == [1, 2, 3]
        assert entry[token].logprob == pytest.approx(expected[token], abs=1e-5)
        total += entry[token].logprob
        tokens.append(token)
    assert output.cumulative_logprob == pytest.approx(total)
    only = run(text_engine, logprobs=0, max_tokens=2).logprobs
    assert only is not None and [len(entry) for entry in only] == [1, 1]
    assert run(text_engine).logprobs is None and run(text_engine).cumulative_logprob is None


def test_logprobs_are_raw_whatever_is_penalised(text_engine: Engine) -> None:
    output = run(text_engine, logprobs=1, logit_bias={13: 100}, max_tokens=1)
    assert output.logprobs is not None and output.logprobs[0][13].rank > 1


def test_defaults_of_the_engine(make_engine: MakeEngine) -> None:
    defaults = SamplingParams.defaults_from({"do_sample": False, "max_new_tokens": 3})
    engine = make_engine(defaults=defaults)
    assert engine.generate([PROMPT])[0].outputs[0].token_ids == greedy(PROMPT, 3)
    plain = engine.generate([PROMPT], SamplingParams(max_tokens=5, temperature=0))
    assert plain[0].outputs[0].token_ids == greedy(PROMPT, 5)
