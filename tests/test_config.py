"""CompileOptions: every value is checked, every name is known, every field is in the key or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from aios_compile.config import NOT_IN_KEY, CompileOptions, SpeculativeConfig
from aios_compile.errors import ConfigError

# A second valid value for every field that is part of the key.
OTHER_VALUES = {
    "quantization": "int8",
    "persistent_decode": True,
    "compile_candidates": 4,
    "quantize_embeddings": True,
    "device": "cpu",
    "dtype": "bfloat16",
    "kv_cache_dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 64,
    "gpu_memory_utilization": 0.5,
    "tokenizer": "elsewhere",
    "disable_passes": ("merge_qkv",),
}
# Fields of the key whose only valid value today is their default.
NOT_BUILT = {"tensor_parallel_size", "pipeline_parallel_size"}


def test_every_field_is_in_the_key_or_named_with_a_reason() -> None:
    names = {item.name for item in dataclasses.fields(CompileOptions)}
    assert set(CompileOptions().key_fields()) | set(NOT_IN_KEY) == names
    assert not set(CompileOptions().key_fields()) & set(NOT_IN_KEY)
    assert set(OTHER_VALUES) | NOT_BUILT | set(NOT_IN_KEY) == names


ALSO_NEEDED = {"quantize_embeddings": {"quantization": "int8"}}


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_each_field_of_the_key_changes_it(name: str) -> None:
    """A cache key that forgot the dtype once served a wrong kernel elsewhere (vllm#53366)."""
    other = ALSO_NEEDED.get(name, {})
    changed = CompileOptions.parse({name: OTHER_VALUES[name], **other})
    plain = CompileOptions.parse(other)
    assert json.dumps(changed.key_fields()) != json.dumps(plain.key_fields())


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_seqs'") as caught:
        CompileOptions.parse({"max_seqs": 3})
    assert "max_num_seqs" in str(caught.value) and "did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dtype", "int9", "float32"),
        ("device", "tpu", "auto, cpu, cuda or interpreter"),
        ("max_num_seqs", 0, "1 to 4096"),
        ("max_num_seqs", True, "whole number"),
        ("max_model_len", 1, "2 to"),
        ("seed", -1, "0 to"),
        ("gpu_memory_utilization", 1.5, "at most 1"),
        ("progress", 1, "True or False"),
        ("kv_cache_dtype", "int3", "bfloat16"),
        ("quantize_embeddings", 1, "True or False"),
        ("quantize_embeddings", True, "quantization to say how"),
        ("disable_passes", ("not a name",), "names of passes"),
        ("cache_dir", 3, "a path"),
        ("scheduling_policy", "lifo", "fcfs, priority, fair_share, shortest_remaining"),
        ("chunked_prefill_size", 0, "1 to"),
        ("swap_space_bytes", -1, "0 to"),
        ("decision_log", 3, "a path"),
    ],
)
def test_a_bad_value_names_field_value_and_range(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileOptions.parse({name: value})
    text = str(caught.value)
    assert name in text and repr(value) in text and expected in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_cache_dtype", "fp8_e5m2"),
        ("tensor_parallel_size", 2),
        ("pipeline_parallel_size", 2),
    ],
)
def test_an_option_whose_part_is_missing_says_so(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="has not been built yet"):
        CompileOptions.parse({name: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_speculative_tokens": 2}, "method=None"),
        ({"method": "eagle"}, "ngram or draft_model"),
        ({"method": "ngram", "model": "folder"}, "model='folder'"),
        ({"method": "draft_model"}, "model=None"),
        ({"method": "ngram", "k": 3}, "unknown key 'k'"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "1 to 64"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 3}, "above"),
        ("ngram", "a mapping"),
    ],
)
def test_a_bad_speculative_config_says_what_is_wrong(given: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileOptions.parse({"speculative_config": given})
    assert "speculative_config" in str(caught.value) and expected in str(caught.value)


def test_speculative_config_takes_vllms_forms() -> None:
    parse = SpeculativeConfig.parse
    assert parse({"model": "[ngram]"}) == parse({"method": "ngram"})
    draft = parse({"model": Path("a/b"), "num_speculative_tokens": 3})
    assert (draft.method, draft.model, draft.num_speculative_tokens) == ("draft_model", "a/b", 3)
    lookup = parse({"method": "ngram", "prompt_lookup_max": 3})
    assert (lookup.prompt_lookup_min, lookup.prompt_lookup_max) == (3, 3)
    assert CompileOptions().speculation is None


def test_torch_dtypes_and_aliases_are_understood() -> None:
    class FakeDtype:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert CompileOptions.parse({"dtype": FakeDtype()}).dtype == "bfloat16"
    assert CompileOptions(dtype="half").dtype == "float16"


def test_disabled_passes_come_from_the_option_and_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOS_DISABLE", "b, a")
    options = CompileOptions.parse({"disable_passes": "c,a"})
    assert options.disabled_passes() == ("a", "b", "c")
    assert options.key_fields()["disable_passes"] == ["a", "b", "c"]


def test_sizes_are_resolved_against_the_model() -> None:
    sizes = CompileOptions().resolve_sizes(256)
    assert (sizes.max_model_len, sizes.max_num_seqs, sizes.max_num_batched_tokens) == (256, 16, 512)
    assert CompileOptions(max_num_batched_tokens=4).resolve_sizes(256).max_num_seqs == 4
    with pytest.raises(ConfigError, match="256 positions"):
        CompileOptions(max_model_len=512).resolve_sizes(256)
    with pytest.raises(ConfigError, match="at least max_num_seqs"):
        CompileOptions(max_num_seqs=8, max_num_batched_tokens=4)
