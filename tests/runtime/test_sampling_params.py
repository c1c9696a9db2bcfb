"""Every field of SamplingParams: its range, its message, its alias, its default."""

from __future__ import annotations

import dataclasses

import pytest

from aios_compile.errors import AiosError, RequestError
from aios_compile.sampling_params import SamplingParams

OUT_OF_RANGE = {
    "n": [0, -1, 1025, 1.5, True, "2", None],
    "max_tokens": [0, -5, 2.0, "16"],
    "min_tokens": [-1, None, 17],  # 17 > max_tokens
    "temperature": [-0.1, 0.001, float("nan"), float("inf"), "hot", None, True, 10**400],
    "top_p": [0.0, 1.01, float("nan"), -1],
    "top_k": [-2, 1.5, "many"],
    "min_p": [-0.1, 1.1, float("nan")],
    "seed": [-2, 2**64, 1.5, "x"],
    "stop": ["", ["a", ""], [1], ["x"] * 65, "y" * 1025, 5],
    "stop_token_ids": [[-1], ["a"], [1.5], 5],
    "ignore_eos": [1, None, "yes"],
    "include_stop_str_in_output": [0, None],
    "repetition_penalty": [0.0, -1.0, 101.0, float("nan")],
    "presence_penalty": [-2.1, 2.1, float("nan")],
    "frequency_penalty": [-2.1, 2.1, float("inf")],
    "logit_bias": [{1: 101}, {-1: 0.0}, {"x": 1.0}, {1: float("nan")}, 5, [5], {"²": 1.0}],
    "allowed_token_ids": [[], [-1], [0.5], 5],
    "bad_words": [[""], [1], 5, ["\ud800"]],
    "logprobs": [-1, 21, 1.5],
    "prompt_logprobs": [-1, 21],
    "priority": [0.5, "high", None, 2**40],
    "timeout_s": [0, -1.0, float("nan"), "soon"],
    "tenant": [None, 1, "x" * 257, "\ud800"],
}


def test_every_field_is_covered() -> None:
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(OUT_OF_RANGE)


@pytest.mark.parametrize("name", sorted(OUT_OF_RANGE))
def test_out_of_range_names_field_value_and_range(name: str) -> None:
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith(name) and "expected" in message, message
        assert isinstance(caught.value, (ValueError, AiosError))


def test_bounds_are_inside() -> None:
    SamplingParams(temperature=0, top_p=1e-9, min_p=1, top_k=-1, max_tokens=None, min_tokens=0)
    SamplingParams(seed=2**64 - 1, logprobs=20, prompt_logprobs=0, presence_penalty=-2, n=1024)
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None


def test_unknown_field_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"unknown sampling parameter 'temprature'") as caught:
        SamplingParams(temprature=0.5)
    for name in OUT_OF_RANGE:
        assert name in str(caught.value)


def test_aliases() -> None:
    params = SamplingParams(max_new_tokens=7, do_sample=False, num_return_sequences=2)
    assert (params.max_tokens, params.temperature, params.n) == (7, 0.0, 2)
    assert SamplingParams(do_sample=True, temperature=0.5).temperature == 0.5
    assert SamplingParams(min_new_tokens=3).min_tokens == 3
    with pytest.raises(RequestError, match="max_tokens=0"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(RequestError, match="do_sample"):
        SamplingParams(do_sample="no")


def test_frozen_hashable_replaceable() -> None:
    params = SamplingParams(stop="x", logit_bias={"5": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert params.stop == ("x",) and params.logit_bias == {5: 1.0}
    assert hash(params) == hash(SamplingParams(stop=["x"], logit_bias={5: 1.0}))
    assert params == SamplingParams(stop=["x"], logit_bias={5: 1.0})
    assert dataclasses.replace(params, n=3).n == 3


def test_defaults_from_generation_config_say_their_source() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "max_new_tokens": 100,
        "eos_token_id": [1, 2],
        "transformers_version": "5.0",
    }
    defaults = SamplingParams.defaults_from(config)
    params = defaults.params(top_k=5)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 0.95)
    assert params.max_tokens == 100
    assert defaults.sources["max_tokens"] == "generation_config.json: max_new_tokens"
    assert "temperature=0.6 (generation_config.json: temperature)" in str(defaults)
    assert "min_p=0.0 (built in)" in str(defaults)


def test_default_greedy_and_its_override() -> None:
    defaults = SamplingParams.defaults_from({"do_sample": False, "temperature": 0.7})
    assert defaults.params().temperature == 0
    assert defaults.params(do_sample=True).temperature == 1.0
    assert defaults.params(temperature=0.3).temperature == 0.3
    assert SamplingParams.defaults_from({"min_new_tokens": 5}).params(max_tokens=2).min_tokens == 2


def test_bad_generation_config_is_named() -> None:
    with pytest.raises(RequestError, match=r"generation_config.json: top_p=7"):
        SamplingParams.defaults_from({"top_p": 7})
