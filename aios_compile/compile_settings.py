"""What the parts of a compile are told: derived from the options, the model and the card.

One function a receiver: capture_for for the capture, pass_options for the passes, limits_of for the
memory plan, settings_of for the runtime; kernel_tuning.py has what GPU kernels are chosen by. The
studies that compile a part of a model by themselves (doctor, bisect, plan_model) take them from
here too.
"""

from __future__ import annotations

from typing import Any

import torch

from aios_compile.capture.capture import capture
from aios_compile.codegen.cpp import build
from aios_compile.codegen.targets import family
from aios_compile.config import KV_CODES, CompileOptions, ResolvedSizes
from aios_compile.errors import ConfigError
from aios_compile.ir.attention_window import window_tokens
from aios_compile.ir.module import IRModule, outputs
from aios_compile.ir.quantization_error import Measured
from aios_compile.model_source import ModelSource
from aios_compile.passes.context import PassOptions

PAGE_SIZE = 16  # tokens; one AVX-512 vector of keys
MIN_PAGE_TABLE = 8  # entries; the batches that passes are proven on need 4 (ir/inputs.py: mixed)
MAX_LOGIT_ROWS = 32  # rows of [R, vocabulary] logits that are planned for at least


def capture_for(model: torch.nn.Module, source: ModelSource, sizes: ResolvedSizes) -> IRModule:
    """Return level 1 of a source's module for steps and sequences of these sizes."""
    return capture(
        model,
        flat=source.flat,
        max_tokens=sizes.max_num_batched_tokens,
        max_length=sizes.max_model_len,
    )


def within(module: IRModule, sizes: ResolvedSizes, options: CompileOptions) -> ResolvedSizes:
    """Return the sizes of a step, no longer than the model's own limit.

    Raises ConfigError where an option asks for more.
    """
    if module.length_limit is None:
        return sizes
    limit, line = module.length_limit
    for name in ("max_model_len", "max_num_batched_tokens"):
        given = getattr(options, name)
        if given is not None and given > limit:
            raise ConfigError(
                f"{name}={given} is out of range: expected at most the {limit} tokens that the "
                "model's code takes",
                source_line=line,
            )
    tokens = min(sizes.max_num_batched_tokens, limit)
    return ResolvedSizes(min(sizes.max_model_len, limit), min(sizes.max_num_seqs, tokens), tokens)


def pass_options(
    options: CompileOptions,
    sizes: ResolvedSizes,
    model: torch.nn.Module,
    measured: Measured | None = None,
    cpu: build.Target | None = None,
) -> PassOptions:
    """Return what the passes need to know of a model and its options.

    measured: what quantising its weights loses; without it, all are quantised. cpu: the
    instruction set on the CPU; the host's without it. Raises ConfigError for weights in a format
    that the target does not multiply.
    """
    stored = next((p.dtype for p in model.parameters()), torch.float32)
    name, target = options.kv_cache_dtype, family(options.device)
    codes = KV_CODES.get(name, "")
    kv_dtype = stored if name == "auto" or codes else getattr(torch, name)
    width = page_table_width(sizes)
    form = options.quantization_format()
    if form.startswith("e4m3") and target == "cpp":
        raise ConfigError(
            f"quantization={options.quantization!r}: no CPU multiplies 8-bit floats",
            advice="quantization='int8' or 'int4' on the CPU; fp8 with device='cuda'",
        )
    bf16_dot = target == "cpp" and (cpu or build.Target.host()).bf16_dot
    return PassOptions(
        target,
        PAGE_SIZE,
        kv_dtype,
        64,
        width,
        form,
        bf16_dot,
        quantize_kv=codes,
        quantize_embeddings=options.quantize_embeddings,
        kept_weights=() if measured is None else measured.kept_weights(),
    )


def page_table_width(sizes: ResolvedSizes) -> int:
    """Return the entries of a sequence's page table: enough for max_model_len tokens."""
    return max(MIN_PAGE_TABLE, -(-sizes.max_model_len // PAGE_SIZE))


def limits_of(module: IRModule, sizes: ResolvedSizes) -> dict[str, int]:
    """Return the largest value of each runtime size, which the plan is made for."""
    tokens = sizes.max_num_batched_tokens
    rows = min(max(MAX_LOGIT_ROWS, sizes.max_num_seqs), max(tokens, sizes.max_num_seqs))
    rows = tokens if module.not_generatable else rows
    return {"T": tokens, "S": sizes.max_num_seqs, "R": rows, "P": 0, "NP": 0, "NB": 0, "NA": 0}


def gpu_card(device: str) -> str:
    """Return the card that a device's kernels are made for: "cuda:90"; "" for the CPU.

    Raises ConfigError for a GPU that is not there.
    """
    if family(device) == "cpp":
        return ""
    from aios_compile.runtime.torch_device import card_name

    return card_name(device)


def settings_of(
    source: ModelSource, module: IRModule, sizes: ResolvedSizes, card: str = "", joined: str = ""
) -> dict[str, Any]:
    """Return what the runtime needs to know of a model; it becomes Program.settings.

    joined: the kind of device for which a layer's kernels become one launch, "" for none.
    """
    logits = outputs(module.root.graph)[0].meta["val"]
    return {
        "name": source.name,
        "page_size": PAGE_SIZE,
        "max_model_len": sizes.max_model_len,
        "max_pages_per_sequence": page_table_width(sizes),
        "vocab_size": int(logits.shape[-1]),
        "eos_token_ids": list(source.eos_token_ids),
        "generation_config": source.generation_config,
        "notes": list(source.notes),
        "generatable": not module.not_generatable,
        "why_not": module.not_generatable,
        "window_tokens": window_tokens(module),
        "target": card or build.Target.host().name,
        "family": "triton" if card else "cpp",
        "persistent_decode": joined,
    }
