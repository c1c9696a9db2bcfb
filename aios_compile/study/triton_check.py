"""Run one Triton kernel alone, on a GPU or in the interpreter, and compare it with its body.

Tensors have the strides that level 3 says; results and workspaces are poisoned before each launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.emit_kernels import Emitted, linear_weights, tensor_arguments
from aios_compile.codegen.expression import TORCH_DTYPES
from aios_compile.codegen.operand import Operand, dim_value
from aios_compile.codegen.planar import pack_planar
from aios_compile.codegen.quantized_weights import form_of
from aios_compile.codegen.source import KernelSource
from aios_compile.ir.module import body_of
from aios_compile.passes.measure import FLOOR_ROUNDINGS
from aios_compile.study.fuzz.judge import STEP, TWO_PARTS
from aios_compile.study.kernel_check import Checked, compare_with_body

LAUNCH_SIZES = ("T", "S", "R", "P")  # those that a module's launch takes
ATTENTION = torch.ops.aios.paged_attention.default
NARROW = {torch.bfloat16, torch.float16, torch.uint8, torch.int8}
EIGHT_BITS = torch.float8_e4m3fn  # not every card has the type: kernels see its bits


class TritonKernels:
    """The kernels of a program as Triton modules on a device of runtime/torch_device.py."""

    def __init__(self, emitted: Emitted, folder: Path, device: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.emitted, self.device = emitted, device
        self.modules = [self._load(source, folder) for source in emitted.sources]

    def _load(self, source: KernelSource, folder: Path) -> Any:
        path = folder / f"{source.symbol}_{source.digest()[:12]}.py"
        path.write_text(source.text, encoding="utf-8")
        return self.device.load(path)

    def launch(
        self, call: fx.Node, env: Mapping[fx.Node, Any], sizes: Mapping[str, int]
    ) -> list[Tensor]:
        """Run the kernel of a call on tensors of its arguments; states are written in place."""
        index, place = self.emitted.by_call[call], self.device.name
        source = self.emitted.sources[index]
        several = isinstance(call.meta["val"], (tuple, list))
        kinds = call.meta["val"] if several else [call.meta["val"]]
        in_place: Mapping[int, int] = call.meta.get("written_in_place", {})
        results = []
        for i, kind in enumerate(kinds):
            held = env[call.args[in_place[i]]] if i in in_place else None  # type: ignore[index]
            operand = Operand.of_value("", kind)
            results.append(_poisoned(operand, sizes, place) if held is None else held)
        spaces = [_poisoned(o, sizes, place) for o in source.workspace]
        if source.counters:
            spaces.append(torch.zeros(source.counters, dtype=torch.int32, device=place))
        tensors = [env[a] for a in tensor_arguments(call)]
        known = {name: sizes[name] for name in LAUNCH_SIZES if name in sizes}
        self.modules[index].launch([*tensors, *results, *spaces], **known)
        return results

    def check(self, call: fx.Node, values: Sequence[Any], sizes: Mapping[str, int]) -> Checked:
        """Run a kernel on the values of its arguments, against its body in float64."""

        kinds = call.meta["val"]
        kinds = kinds if isinstance(kinds, (tuple, list)) else [kinds]
        layouts = linear_weights(call, packs=False)

        def run(values: Sequence[Any]) -> list[Tensor]:
            given, env = dict(zip(call.args, values)), {}
            for i, argument in enumerate(tensor_arguments(call)):
                value = given[argument].detach()
                if i in layouts:
                    value = pack_planar(value.contiguous(), form_of(layouts[i]), argument.name)
                else:
                    value = _laid_out(Operand.of_value("", argument.meta["val"]), value, sizes)
                env[argument] = value.to(self.device.name)
            results = self.launch(call, env, sizes)
            return [_viewed(r.cpu(), k) for r, k in zip(results, kinds)]

        return compare_with_body(call, values, run, _least_budget(call))


def _least_budget(call: fx.Node) -> float:
    """Return what the tensor cores round on purpose, relative to the largest value.

    float32 meets half precision and codes of weights as two parts of bfloat16; queries and
    probabilities meet the codes of a KV cache as one part.
    """
    nodes = body_of(call).graph.nodes
    if any("k_scales" in n.kwargs for n in nodes if n.target is ATTENTION):
        return 2 * STEP  # of the queries and of the probabilities
    kinds = {a.meta["val"].dtype for a in tensor_arguments(call)}
    return FLOOR_ROUNDINGS * TWO_PARTS if kinds & NARROW else 0.0


def _viewed(result: Tensor, kind: Tensor) -> Tensor:
    return result.view(EIGHT_BITS) if kind.dtype == EIGHT_BITS else result


def _laid_out(operand: Operand, value: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Return a copy with the operand's strides, codes of 8-bit floats as their bits."""
    strides = [dim_value(d, sizes) for d in operand.strides]
    made = torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)
    return made.view(torch.uint8) if made.dtype == EIGHT_BITS else made


def _poisoned(operand: Operand, sizes: Mapping[str, int], place: str) -> Tensor:
    """Return a tensor of an operand's shape and strides, full of NaN, or of -7."""
    shape = [dim_value(d, sizes) for d in operand.shape]
    strides = [dim_value(d, sizes) for d in operand.strides]
    dtype = TORCH_DTYPES[operand.dtype]
    made = torch.empty_strided(shape, strides, dtype=dtype, device=place)
    return made.fill_(float("nan") if dtype.is_floating_point else 1 if dtype is torch.bool else -7)
