"""What is refused, with which words, and that a refusal disturbs nobody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aios_compile.compiled_model import as_ids, is_one_prompt
from aios_compile.errors import ConfigError, PromptTooLongError, RequestError
from aios_compile.runtime.admission import Admission, as_prompts
from aios_compile.runtime.engine import Engine
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, greedy, limits


def admission(tokenizer: Any = None, **changes: Any) -> Admission:
    return Admission(limits(**changes), tokenizer, frozenset([0]))


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([50], {}, "prompt: token id 50 is out of the vocabulary, expected 0 to 49"),
        ([-1], {}, "prompt: token id -1"),
        ([1.5], {}, "prompt: got 1.5"),
        ([True], {}, "prompt: got True"),
        ([np.array([1, 2])], {}, "prompt: got array"),
        (["a"], {}, "prompt: got 'a'"),
        ([1], {"stop_token_ids": [50]}, "stop_token_ids: token id 50"),
        ([1], {"logit_bias": {2**40: 1.0}}, "logit_bias: token id 1099511627776"),
        ([1], {"allowed_token_ids": [3, 99]}, "allowed_token_ids: token id 99"),
        ([1], {"allowed_token_ids": [0], "min_tokens": 1}, "leaves no token"),
        ([1], {"allowed_token_ids": [1], "bad_words": ["a"]}, "leaves no token"),
    ],
)
def test_refusals(prompt: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        admission(FakeTokenizer()).admit(prompt, SamplingParams(**fields))


@pytest.mark.parametrize(
    ("length", "fields", "changes", "message"),
    [
        (64, {}, {}, "has 64 tokens, expected at most 63"),
        (65, {}, {}, "has 65 tokens"),
        (33, {"max_tokens": 1}, {"num_pages": 9}, "it has 32"),
        (20, {"max_tokens": 14}, {"num_pages": 9}, r"need 33 tokens of KV cache, it has 32"),
        (20, {"max_tokens": 14}, {"max_pages_per_sequence": 8}, "need 33 tokens"),
    ],
)
def test_what_never_fits_is_refused(
    length: int, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptTooLongError, match=message) as caught:
        admission(**changes).admit([1] * length, SamplingParams(**fields))
    assert "try:" in str(caught.value)


def test_max_tokens_is_clipped_to_what_fits() -> None:
    def clipped(length: int, wanted: int | None, **changes: Any) -> int:
        params = SamplingParams(max_tokens=wanted)
        return admission(**changes).admit([1] * length, params).max_tokens

    assert clipped(60, 100) == clipped(60, None) == 4
    assert clipped(20, None, num_pages=9) == clipped(20, 13, num_pages=9) == 13
    assert clipped(32, None, num_pages=9) == 1


def test_text_needs_a_tokenizer_and_a_bounded_size() -> None:
    with pytest.raises(RequestError, match="needs a tokenizer"):
        admission().admit("a", SamplingParams())
    for fields in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(RequestError, match="tokenizer"):
            admission().admit([1], SamplingParams(**fields))

    class Untouchable(FakeTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            raise AssertionError("a text that can never fit was tokenised")

    with pytest.raises(PromptTooLongError, match="characters"):
        admission(Untouchable()).admit("a" * 10**6, SamplingParams())


def test_logits_are_checked_too(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for ids in ([], [50], [1] * 65):
        with pytest.raises(RequestError):
            engine.logits(ids)


def test_one_bad_prompt_in_a_list_runs_none(make_engine: MakeEngine) -> None:
    engine = make_engine(seed=3)
    expected = make_engine(seed=3).generate([[1, 2]], max_tokens=5)[0].outputs
    with pytest.raises(RequestError, match="prompt 1: prompt: token id 77"):
        engine.generate([[1, 2], [77]], max_tokens=5)
    assert engine.stats.num_steps == 0
    assert engine.generate([[1, 2]], max_tokens=5)[0].outputs == expected, "not even a seed is used"


def test_refusals_disturb_nobody(text_engine: Engine) -> None:
    stream = text_engine.stream([1, 2, 3], temperature=0, max_tokens=40)
    for bad in ([], [99], [1] * 70, "x" * 10**6):
        with pytest.raises(RequestError):
            text_engine.generate([bad])
    assert [t for c in stream for t in c.token_ids] == greedy([1, 2, 3], 40)


def test_wrong_calls(text_engine: Engine) -> None:
    with pytest.raises(RequestError, match="expected a list"):
        text_engine.generate("abc")
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        text_engine.generate(["a"], [SamplingParams()] * 2)
    with pytest.raises(RequestError, match="expected one"):
        text_engine.generate(["a"], SamplingParams(), top_k=3)
    for params in ({"max_tokens": 3}, "x", [{"top_k": 1}]):
        with pytest.raises(RequestError, match=r"sampling_params: got a .*expected SamplingParams"):
            text_engine.generate(["a"], params)  # type: ignore[arg-type]
    assert text_engine.generate([]) == []


@pytest.mark.parametrize("prompts", [None, 5, 1.5, {"a": 1}, {1}, iter([1]), np.array(3)])
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"prompts is a .*expected text, token ids"):
        is_one_prompt(prompts)


@pytest.mark.parametrize("ids", ["abc", None, [[1], [2, 3]], [2**70], object(), 3, [1.0], [1j]])
def test_what_is_no_list_of_ids(ids: Any) -> None:
    with pytest.raises(ConfigError, match=r"input_ids .*expected integers \[T\]"):
        as_ids(ids, "input_ids")


def test_one_prompt_or_a_list_of_them() -> None:
    assert as_prompts("a") == (["a"], True)
    assert as_prompts([1, 2]) == ([[1, 2]], True)
    assert as_prompts(np.array([1, 2]))[1] is True
    assert as_prompts(["a", [1]]) == (["a", [1]], False)
    assert as_prompts([[1], [2]]) == ([[1], [2]], False)
    assert as_prompts(np.array([[1, 2], [3, 4]]))[1] is False
    assert as_prompts([]) == ([], False)


def test_eos_out_of_the_vocabulary_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="eos_token_id 50"):
        Engine(FakeExecutor(limits()), eos_token_ids=[1, 50])
