"""Read the fields of a config.json one by one, checked, and account for every key.

A key is read, known to be harmless, refused because it changes the mathematics, or reported as
ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aios_compile.errors import CheckpointError, UnsupportedModelError

# Keys that transformers writes or reads and that do not change the logits of a causal LM at
# inference.
_WORDS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path
    architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping embd_pdrop embedding_dropout encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout id2label initializer_range is_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    rope_parameters rope_scaling sep_token_id suppress_tokens task_specific_params temperature
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p unsloth_fixed unsloth_version use_cache
"""
HARMLESS = frozenset(_WORDS.split())

# Keys that change the mathematics in some family of transformers, with the values that change
# nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_temperature_tuning": (None, False, 0),
    "auto_map": (None,),
    "clip_qkv": (None,),
    "compression_config": (None,),
    "cross_attention_hidden_size": (None,),
    "dual_chunk_attention_config": (None,),
    "embedding_multiplier": (None, 1),
    "embedding_size": (None,),
    "final_logit_softcapping": (None,),
    "hidden_activation": (None, "silu"),
    "interleaved_sliding_window": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "kv_lora_rank": (None,),
    "layer_norm_eps": (None,),
    "lm_head_bias": (None, False),
    "lm_head_multiplier": (None, 1),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "moe_intermediate_size": (None,),
    "mup_width_scale": (None, 1),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, ()),
    "nope_layer_interval": (None, 0),
    "norm_after": (None, False),
    "norm_topk_prob": (None, False),
    "num_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "num_local_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "parallel_attn": (None, False),
    "per_layer_config": (None,),
    "position_embedding_type": (None, "rope", "absolute"),
    "pruned_heads": (None, {}),
    "q_lora_rank": (None,),
    "qk_layernorm": (None, False),
    "qk_norm": (None, False),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "rope_local_base_freq": (None,),
    "rope_traditional": (None, False),
    "scale_embedding": (None, False),
    "text_config": (None,),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
    "vision_config": (None,),
}


class Fields:
    """One JSON object whose reads are type- and range-checked; `where` names it in errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the raw value, or the default where the key is absent."""
        self.read.add(key)
        return self.values.get(key, default)

    def get_int(self, key: str, default: int | None, low: int, high: int) -> int:
        """Return a whole number in [low, high]; no default means that the key must be there."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def get_float(self, key: str, default: float, low: float, high: float) -> float:
        """Return a finite number in [low, high]."""
        value = self.get(key)
        value = default if value is None else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise self.wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def get_bool(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def get_name(self, key: str, default: str | None = None) -> str | None:
        """Return a string, or the default where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a name")
        return value

    def get_names(self, key: str) -> list[str] | None:
        """Return a list of strings, None where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, value, "a list of names")
        return value

    def wrong(self, key: str, got: object, expected: str) -> CheckpointError:
        """Return the error of a field with a value that cannot be."""
        shown = "nothing" if got is None else repr(got)[:80]
        return CheckpointError(f"{self.where}: {key} is {shown}, expected {expected}")

    def refuse_other_mathematics(self) -> None:
        """Raise UnsupportedModelError for the first key that changes the result and is not
        honoured.
        """
        for key in sorted(self.values.keys() & NEUTRAL.keys() - self.read):
            value = self.values[key]
            if tuple(value) == () if isinstance(value, list) else value in NEUTRAL[key]:
                continue
            advice = None
            if key == "auto_map":
                advice = "code from a model folder is never run; use a checkpoint of a known family"
            elif key == "quantization_config":
                advice = "use the unquantised checkpoint"
            shown = repr(value)[:80]
            raise UnsupportedModelError(
                f"{self.where}: {key} = {shown} changes the mathematics and is not implemented",
                advice=advice,
            )

    def ignored(self) -> tuple[str, ...]:
        """Return the keys that nobody read and nobody knows, sorted."""
        return tuple(sorted(self.values.keys() - self.read - HARMLESS - NEUTRAL.keys()))
