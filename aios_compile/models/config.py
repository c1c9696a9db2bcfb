"""config.json to `ModelConfig`: every field that changes the mathematics is honoured or refused by
name.

Free of torch, so that a cached start can read it. Defaults for absent keys are those of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aios_compile.errors import UnsupportedModelError
from aios_compile.models.fields import Fields
from aios_compile.models.rope_config import MAX_LENGTH, RopeConfig, read_rope

__all__ = ["FAMILIES", "Family", "ModelConfig", "RopeConfig"]


@dataclass(frozen=True)
class Family:
    """What a model type fixes and what it takes for absent keys. None for a bias: the config
    says.
    """

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", 2048, None, qkv_bias=None, o_bias=None, mlp_bias=None),
    "mistral": Family("MistralForCausalLM", 131072, 8),
    "qwen2": Family("Qwen2ForCausalLM", 32768, 32, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", 32768, 32, 128, qkv_bias=None, o_bias=None, qk_norm=True),
}

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
}
DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class ModelConfig:
    """The mathematics of one decoder. `windows` has one entry a layer: keys seen, None for all."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    ignored_keys: tuple[str, ...]

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a parsed config.json. Raises UnsupportedModelError, or CheckpointError on bad
        values.
        """
        fields = Fields(values, where)
        model_type = _model_type(fields)
        family = FAMILIES[model_type]
        heads = fields.get_int("num_attention_heads", None, 1, 4096)
        hidden_size = fields.get_int("hidden_size", None, 1, 1 << 20)
        head_dim = _head_dim(fields, family, hidden_size, heads)
        kv_heads = fields.get_int(
            "num_key_value_heads", family.num_key_value_heads or heads, 1, 4096
        )
        if heads % kv_heads:
            raise fields.wrong("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        layers = fields.get_int("num_hidden_layers", None, 1, 4096)
        vocab_size = fields.get_int("vocab_size", None, 1, 1 << 24)
        length = fields.get_int(
            "max_position_embeddings", family.max_position_embeddings, 1, MAX_LENGTH
        )
        rope, ignored_rope = read_rope(fields, head_dim, length)
        attention_bias = _bias(fields, "attention_bias", family.qkv_bias)
        config = ModelConfig(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.get_int("intermediate_size", None, 1, 1 << 24),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=_activation(fields),
            rms_norm_eps=fields.get_float("rms_norm_eps", 1e-6, 0.0, 1.0),
            max_position_embeddings=length,
            rope=rope,
            windows=_windows(fields, model_type, layers),
            qkv_bias=attention_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=_bias(fields, "mlp_bias", family.mlp_bias),
            qk_norm=family.qk_norm,
            tie_word_embeddings=fields.get_bool("tie_word_embeddings", False),
            dtype=_dtype(fields),
            bos_token_id=next(iter(token_ids(fields, "bos_token_id", vocab_size)), None),
            eos_token_ids=token_ids(fields, "eos_token_id", vocab_size),
            pad_token_id=next(iter(token_ids(fields, "pad_token_id", vocab_size)), None),
            ignored_keys=fields.ignored() + ignored_rope,
        )
        fields.refuse_other_mathematics()
        return config


def token_ids(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of a special token (absent, one or a list); -1 for padding means none."""
    value = fields.get(key)
    if value is None or (key == "pad_token_id" and value == -1):
        return ()
    ids = value if isinstance(value, list) else [value]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocab_size:
            raise fields.wrong(key, index, f"a token id below vocab_size {vocab_size}")
    return tuple(ids)


# What to do with an architecture that is not here.
_OTHER_FAMILY = "build it with its own library: pass the nn.Module, or FILE.py:NAME to a command"


def _model_type(fields: Fields) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = fields.get_names("architectures") or []
    known = ", ".join(sorted(by_architecture))
    for name in architectures:
        if name not in by_architecture:
            raise UnsupportedModelError(
                f"{fields.where}: architecture {name!r} is not implemented, known: {known}",
                advice=_OTHER_FAMILY,
            )
    model_type = fields.get_name("model_type")
    if model_type is None and architectures:
        model_type = by_architecture[architectures[0]]
    if model_type is None or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{fields.where}: model_type {model_type!r} is not implemented, known: "
            f"{', '.join(sorted(FAMILIES))}",
            advice=_OTHER_FAMILY,
        )
    if architectures and by_architecture[architectures[0]] != model_type:
        raise fields.wrong("architectures", architectures, FAMILIES[model_type].architecture)
    return model_type


def _head_dim(fields: Fields, family: Family, hidden_size: int, heads: int) -> int:
    if fields.get("head_dim") is None and family.head_dim is None and hidden_size % heads:
        raise fields.wrong("hidden_size", hidden_size, f"a multiple of the {heads} heads")
    head_dim = fields.get_int("head_dim", family.head_dim or hidden_size // heads, 2, 4096)
    if head_dim % 2:
        raise fields.wrong("head_dim", head_dim, "an even number, for rotary positions")
    return head_dim


def _bias(fields: Fields, key: str, fixed: bool | None) -> bool:
    """Return the bias switch; a family that fixes it refuses a config that says otherwise."""
    value = fields.get_bool(key, bool(fixed))
    if fixed is not None and value != fixed:
        raise UnsupportedModelError(
            f"{fields.where}: {key} = {value} is not implemented for this model type"
        )
    return value


def _activation(fields: Fields) -> str:
    name = fields.get_name("hidden_act", "silu") or ""
    if name not in ACTIVATION_NAMES:
        raise UnsupportedModelError(
            f"{fields.where}: hidden_act {name!r} is not implemented, known: "
            f"{', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[name]


def _dtype(fields: Fields) -> str | None:
    name = fields.get_name("dtype") or fields.get_name("torch_dtype")
    if name is None or name == "auto":
        return None
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(
            f"{fields.where}: dtype {name!r} is not implemented, known: {', '.join(DTYPES)}"
        )
    return name


def _windows(fields: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer, with each family's own reading of the fields."""
    switch = fields.get_bool("use_sliding_window", model_type == "mistral")
    default = 0 if model_type == "llama" else DEFAULT_WINDOW
    window: int | None = default or None
    if "sliding_window" in fields.values:
        given = fields.get("sliding_window")
        window = None if given is None else fields.get_int("sliding_window", None, 1, MAX_LENGTH)
    if model_type.startswith("qwen") and not switch:
        window = None
    first = fields.get_int("max_window_layers", 28, 0, 1 << 20)
    if model_type == "mistral":
        first = 0
    types = fields.get_names("layer_types")
    if types is None:
        types = [
            "sliding_attention" if window is not None and i >= first else "full_attention"
            for i in range(layers)
        ]
    if len(types) != layers:
        raise fields.wrong("layer_types", types, f"a list of {layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"{fields.where}: layer type {name!r} is not implemented")
        if name == "sliding_attention" and window is None:
            raise fields.wrong("sliding_window", None, "a window for the sliding layers")
    windows = tuple(window if name == "sliding_attention" else None for name in types)
    # Llama reads none of these fields in transformers, Mistral slides in every layer or in none.
    mixed = model_type == "mistral" and window is not None and None in windows
    if mixed or (model_type == "llama" and (any(windows) or (switch and window))):
        raise UnsupportedModelError(
            f"{fields.where}: sliding_window = {window} with these layer types is not implemented "
            f"for {model_type}"
        )
    return windows
