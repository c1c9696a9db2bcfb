"""The whole chain against transformers in float32: logits within 1e-4, 64 greedy tokens equal.

The zoo's weights are drawn so that leaving out any component moves the logits by at least a
hundred times the tolerance (tests/test_models_zoo.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import zoo
from tests.compiled.conftest import Load
from tests.variants import nightly

NUM_GREEDY = 64
PROMPT = 8
NAMES = (
    "llama_gqa", "llama_mqa", "llama_tied", "llama_attention_bias", "llama_mlp_bias",
    "llama_head_dim", "llama_odd_sizes", "llama_gelu_tanh", "llama_linear",
    "llama_llama3", "llama_yarn", "llama_dynamic", "llama_partial_rotary",
    "mistral_window", "mistral_window_page", "mistral_head_dim",
    "qwen2_gqa", "qwen2_tied", "qwen2_layer_types", "qwen2_dynamic",
    "qwen3_gqa", "qwen3_bias", "qwen3_window", "qwen3_layer_types",
)  # fmt: skip
NIGHTLY = ("mistral_yarn", "qwen2_yarn", "qwen3_tied")


def cached_greedy(path: Path, ids: list[int], num_tokens: int) -> list[int]:
    """Return the greedy tokens of transformers with its own KV cache.

    With dynamic RoPE that is not what a run without a cache gives: cached keys keep the base of
    the length at which they were written.
    """
    model, found, cache = zoo.reference_model(path), [], None
    given = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(num_tokens):
            result = model(given, past_key_values=cache, use_cache=True)
            cache, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
            found.append(int(given))
    return found


@pytest.mark.parametrize("name", [*NAMES, *nightly(*NIGHTLY)])
def test_logits_and_greedy_tokens(name: str, load: Load, zoo_folder: Path) -> None:
    """48 tokens in chunks of at most 21: they cross pages of 16, windows and trained lengths."""
    model = load(name)
    path = zoo.make(name, zoo_folder)
    ids = zoo.token_ids(path)
    expected = zoo.reference_logits(path, ids)
    for length in (zoo.NUM_TOKENS, 16, 1):  # shorter ones fit one step
        given = expected if length == len(ids) else zoo.reference_logits(path, ids[:length])
        error = float((model(ids[:length]) - given).abs().max())
        print(f"{name} T={length}: {error:.2e}")
        assert error <= zoo.TOLERANCE
    prompt = ids[:PROMPT]
    result = model.generate([prompt], max_tokens=NUM_GREEDY, temperature=0, ignore_eos=True)[0]
    assert result.outputs[0].token_ids == cached_greedy(path, prompt, NUM_GREEDY)


def test_the_zoo_covers_what_was_promised() -> None:
    assert len(NAMES) >= 24
    assert {name.split("_")[0] for name in NAMES} == {"llama", "mistral", "qwen2", "qwen3"}
    assert set(NAMES) <= set(zoo.ZOO)
