"""Hugging Face families, tiny and random: logits and greedy tokens of transformers."""

import os

import pytest
import torch

from aios_compile.errors import AiosError, CaptureError, RequestError
from tests.foreign import families

TOLERANCE = 1e-4
TESTED = (
    "gemma2", "gpt2", "gpt_oss", "llama4",
)  # fmt: skip
OTHERS = (  # FOREIGN_FAMILIES=all
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "gpt_neox_serial", "gptj", "phi",
    "phi3", "olmo", "olmo2", "olmo3", "opt", "cohere2", "falcon", "stablelm", "stablelm_qk",
    "granite", "smollm3", "starcoder2", "exaone4", "xglm", "glm", "glm4", "nemotron", "persimmon",
    "helium", "gpt_bigcode", "arcee", "seed_oss", "ernie4_5", "hunyuan", "biogpt", "qwen2_moe",
    "qwen3_moe", "olmoe", "flex_olmo", "phimoe", "granitemoe", "granitemoeshared", "glm4_moe_lite",
    "mistral4", "dots1", "glm4_moe", "solar_open", "ernie4_5_moe", "hunyuan_moe", "minimax",
    "minimax_m2", "exaone_moe", "lfm2_moe", "mimo_v2_flash", "cohere2_moe", "falcon_alibi",
    "deepseek_v2", "deepseek_v3", "mpt", "cohere", "codegen", "falcon_new", "bloom", "mixtral",
    "gpt_neox",
)  # fmt: skip
ALL = os.environ.get("FOREIGN_FAMILIES") == "all"
CHOSEN = (*TESTED, *OTHERS) if ALL else TESTED
CALLED = {
    "phi3_long": "modeling_rope_utils.py:.*torch.max",  # the longest sequence chooses the factors
    "gpt_neo": "modeling_gpt_neo.py:.*from layer to layer",  # windows in equal layers
}
REFUSED = {
    "dbrx": "modeling_dbrx.py:.*expert_hit",
    "mamba": "modeling_mamba.py:",
}


def logits_of(model, ids):
    positions = torch.arange(len(ids))[None]
    with torch.no_grad():
        return model(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0]


def check_logits(model, found):
    generator = torch.Generator().manual_seed(3)
    for tokens in (1, 2, 16, 17, 40):
        ids = torch.randint(3, families.VOCABULARY, (tokens,), generator=generator)
        expected = logits_of(model, ids)
        error = (found(ids) - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= TOLERANCE, f"T={tokens}"


@pytest.mark.parametrize("name", CHOSEN)
def test_family(name, compiled):
    model = families.build(name)
    with compiled(model, max_num_batched_tokens=24) as found:  # 40 tokens are two chunks
        check_logits(model, found)
        prompt = torch.arange(5, 14)[None]
        expected = model.generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
        )
        result = found.generate(prompt[0].tolist(), max_tokens=12, temperature=0, ignore_eos=True)
        assert list(result.outputs[0].token_ids) == expected[0, 9:].tolist()


@pytest.mark.parametrize("name", list(CALLED)[: None if ALL else 1])
def test_family_that_is_only_called(name, compiled):
    model = families.build(name)
    if name == "phi3_long" and families.longrope_branches():
        with pytest.raises(CaptureError, match=r"modeling_rope_utils\.py:.*if seq_len > original"):
            compiled(model)
        return
    with compiled(model) as found:
        check_logits(model, found)
        with pytest.raises(RequestError, match=CALLED[name]):
            found.generate([3, 4], max_tokens=2)


@pytest.mark.parametrize("name", list(REFUSED)[: None if ALL else 1])
def test_family_that_is_refused(name, compiled):
    with pytest.raises(AiosError, match=REFUSED[name]):
        compiled(families.build(name))


def test_window_that_only_the_mask_tells(compiled):
    """A layer that attends within its mask's window, and is not told of it, is no causal layer."""
    from transformers.models.mistral import modeling_mistral

    class Untold(modeling_mistral.MistralAttention):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.config = type(config)(**{**config.to_dict(), "sliding_window": None})

    model = families.build("mistral")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Untold
        layer.self_attn.config = type(model.config)(
            **{**model.config.to_dict(), "sliding_window": None}
        )
        layer.self_attn.config._attn_implementation = "eager"
    with compiled(model) as found:
        check_logits(model, found)
