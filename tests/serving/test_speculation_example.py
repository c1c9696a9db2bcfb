"""Speculation on the example checkpoint: the same bits with and without, in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import aios_compile
from aios_compile import SamplingParams
from aios_compile.compiled_model import make_speculator
from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError
from tests.serving.conftest import DRAFT, EXAMPLE, OPTIONS, PROMPTS

CONFIGS: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_min": 1,
        "adaptive": False,
    },
    "draft": {"model": DRAFT, "num_speculative_tokens": 4, "adaptive": False},
    "adaptive": {"model": DRAFT, "num_speculative_tokens": 4},
}


@pytest.fixture(scope="module", params=CONFIGS)
def speculating(request: pytest.FixtureRequest) -> Iterator[aios_compile.CompiledModel]:
    config = CONFIGS[request.param]
    with aios_compile.load_and_compile(EXAMPLE, speculative_config=config, **OPTIONS) as model:
        yield model


def params(i: int) -> SamplingParams:
    """Return greedy and sampled parameters with everything that looks at the history."""
    return SamplingParams(
        max_tokens=(80, 33, 60)[i % 3],
        temperature=(0.0, 0.8)[i % 2],
        seed=i,
        repetition_penalty=(1.0, 1.0, 1.15)[i % 3],
        frequency_penalty=0.2 if i == 5 else 0.0,
        min_tokens=20 if i == 3 else 0,
        stop=["\n\n"] if i in (1, 3) else [],
        logprobs=2 if i in (0, 1, 4) else None,
        n=2 if i == 4 else 1,
        top_k=50 if i % 2 else 0,
    )


def test_tokens_and_logprobs_are_the_same_bits(
    example: aios_compile.CompiledModel, speculating: aios_compile.CompiledModel
) -> None:
    prompts = [*PROMPTS, *(prompt + " and" for prompt in PROMPTS)]
    given = [params(i % len(PROMPTS)) for i in range(len(prompts))]
    expected = example.generate(prompts, given)
    for outputs in (
        speculating.generate(prompts, given),  # mixed
        [speculating.generate(p, g) for p, g in zip(prompts, given)],  # each alone
    ):
        for ours, theirs in zip(outputs, expected):
            assert ours.outputs == theirs.outputs  # texts, tokens, reasons, bits of log-probs
    stats = speculating.engine.speculation
    assert stats is not None and not stats.failure
    config = speculating.options.speculation
    assert config is not None and stats.num_accepted_tokens > (10 if config.adaptive else 50)
    assert str(stats) in str(speculating.report())


@pytest.mark.parametrize("speculating", ["draft"], indirect=True)
def test_the_draft_model_agrees_at_every_temperature(
    speculating: aios_compile.CompiledModel,
) -> None:
    """It draws with the request's own noise: sampled text is accepted about as often as greedy."""
    rates = []
    stats = speculating.engine.speculation
    assert stats is not None
    for temperature in (0.0, 0.8):
        tokens, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
        speculating.generate(PROMPTS, temperature=temperature, seed=1, max_tokens=100)
        rates.append((stats.num_accepted_tokens - accepted) / (stats.num_draft_tokens - tokens))
    assert min(rates) > 0.3, rates


def test_a_draft_of_another_vocabulary_is_refused(example: aios_compile.CompiledModel) -> None:
    options = CompileOptions(speculative_config={"model": "small"})
    limits = replace(example.limits, vocab_size=example.limits.vocab_size - 1)
    draft: Any = SimpleNamespace(limits=limits)
    with pytest.raises(ConfigError, match="small has 1023 tokens in its vocabulary"):
        make_speculator(options, example.limits, draft)
