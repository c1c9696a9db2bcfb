"""The kernels of Qwen3-0.6B and Llama-3.1-8B for four GPUs, planned without a GPU or weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.cards import CARDS
from aios_compile.config import CompileOptions
from aios_compile.errors import CodegenError
from aios_compile.study.plan_model import Planned, Rewritten, open_without_weights, rewrite_model
from tests.codegen.triton_ledger import Kernel

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
    "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 4, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
LLAMA_8B = {
    **QWEN3, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
    "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LEDGER = Path(__file__).with_name("triton_ledger.txt")
MODELS = {"Qwen3-0.6B": QWEN3, "Llama-3.1-8B": LLAMA_8B}
# What is stored in which form; the pages of keys and values of one model are enough.
FORMS: dict[str, dict[str, str]] = {
    "bf16": {}, "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"}, "int8 pages": {"kv_cache_dtype": "int8"},
    "fp8 pages": {"kv_cache_dtype": "fp8"},
}  # fmt: skip


def forms_of(model: str) -> list[str]:
    """Return the forms of a model whose kernels are compiled."""
    return [form for form in FORMS if model == "Qwen3-0.6B" or "pages" not in form]


@functools.cache
def rewritten(model: str, form: str, folder: Path) -> Rewritten:
    """Return the last level of a model: it is the same for every card."""
    place = folder / model
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({**MODELS[model], "num_hidden_layers": 2}))
    options = CompileOptions.parse({"max_model_len": 4096, "device": "cuda", **FORMS[form]})
    return rewrite_model(open_without_weights(place, options), options)


def planned(model: str, form: str, target: str, folder: Path) -> Planned | None:
    """Return the plan for a card; None if the card does not multiply the form, which it says."""
    try:
        return rewritten(model, form, folder).planned_for(target)
    except CodegenError as error:
        refused = f"{target} ({CARDS[target].name}) does not multiply e4m3"
        assert form == "fp8" and not CARDS[target].fp8 and refused in str(error), error
        return None


def kernels_of(model: str, folder: Path) -> list[Kernel]:
    """Return each kernel that the model has in any form, once a target."""
    found: dict[tuple[str, str], Kernel] = {}
    for form in forms_of(model):
        for target in CARDS:
            plan = planned(model, form, target, folder)
            every: list[KernelSource] = plan.emitted.sources if plan else []
            for source in every:
                kernel = Kernel(target, f"{model} {form}", source)
                found.setdefault((target, source.text), kernel)
    return list(found.values())
