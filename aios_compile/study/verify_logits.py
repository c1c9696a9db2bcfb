"""Compare a loaded model's logits with its PyTorch module on the real weights (AIOS_VERIFY=2).

The oracle is the module in a wider dtype; the budget comes from the error that the module makes in
its own dtype, as for the certificates of the passes. What was asked to be quantised at load
(weights, the KV cache) loses more: its error is told, and no budget is held against it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aios_compile.capture.call_convention import call_convention, logits_in
from aios_compile.config import KV_CODES
from aios_compile.errors import EngineError
from aios_compile.passes.certificate import FACTORS
from aios_compile.passes.measure import FLOOR_ROUNDINGS

if TYPE_CHECKING:
    from aios_compile.compiled_model import CompiledModel
    from aios_compile.model_source import ModelSource

NUM_TOKENS = 24  # more than a page


def verify_logits(model: CompiledModel, source: ModelSource) -> str:
    """Return a line that tells the error; raise EngineError when it exceeds its budget."""
    module = materialise(source)
    stored = next(p.dtype for p in module.parameters())
    limits = model.limits
    generator = torch.Generator().manual_seed(model.options.seed)
    length = min(NUM_TOKENS, limits.max_model_len, limits.capacity_tokens)
    ids = torch.randint(0, limits.vocab_size, (length,), generator=generator)
    eager = run(module, ids, source.flat)
    wide = torch.float64 if stored is torch.float32 else torch.float32
    oracle = run(module.to(wide), ids, source.flat)
    largest = float(oracle.abs().max())
    allowed = FACTORS["reassociates"] * float((eager - oracle).abs().max())
    allowed += FLOOR_ROUNDINGS * torch.finfo(stored).eps * largest
    error = float((model(ids)[-len(oracle) :] - oracle).abs().max())  # it may give the last only
    told = f"logits differ from eager by {error:.2e} (largest {largest:.2e}, "
    options = model.options
    if error > allowed and (options.quantization or options.kv_cache_dtype in KV_CODES):
        return f"{told}quantised, which no budget is held against)"
    text = f"{told}allowed {allowed:.2e})"
    if not error <= allowed:
        raise EngineError(text, advice="AIOS_EAGER=1 runs the last level without its kernels")
    return text


def materialise(source: ModelSource) -> nn.Module:
    """Return the source's module with its real weights; the caller owns it."""
    module = source.build()
    if source.flat is None:
        return copy.deepcopy(module)
    found: dict[int, nn.Parameter] = {}  # tied parameters are one object under several names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in found:
            try:
                value = source.read(name).to(parameter.dtype, copy=True)
            except KeyError:
                continue  # tied: read under its other name
            found[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for child in module.modules():
        for name, held in child._parameters.items():
            if held is not None:
                child._parameters[name] = found[id(held)]
    return module


@torch.no_grad()
def run(module: nn.Module, ids: Tensor, flat: bool | None) -> Tensor:
    """Return the float64 logits [T, V] of one sequence, whatever shape the module gives; [1, V] of
    a module that gives the last token's only.
    """
    positions = torch.arange(len(ids))
    batch = (ids, positions) if flat else (ids[None], positions[None])
    result: Any = logits_in(module(**call_convention(module).arguments(*batch)))
    logits: Tensor = result.reshape(-1, result.shape[-1]).double()
    return logits
