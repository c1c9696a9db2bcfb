"""The kernel shared by rope, kv_write and their fusion with the q and k norms: one head at a time.

out[t, h] = rotate(norm(q[t, h])); k_cache[page, g, :, offset] = rotate(norm(k[t, g]));
v_cache[page, g, offset, :] = v[t, g] with page, offset = slots[t] divided by the page size. Norm
and rotation are each optional, and so is q or the pair k, v. Caches of int8 codes get
rint(x * 127 / max|x|) of a head and their scales max|x| / 127, e4m3 the same with 448
(ir/quantized.py: quantize_groups).
Layouts: q[T, H, D], k[T, G, D], v[T, G, Dv] float32, elements of a head dense, any token and head
stride (slices of the merged projection); cos, sin [T, R] float32, R <= D; norm weights [D] of any
float dtype; slots i64[T]; k_cache[N, G, D, page], v_cache[N, G, page, Dv] in float32, bf16, f16, or
int8 or e4m3 with k_scales, v_scales f32[N, G, page].
Bytes a token: each head read and written once. Items: (token, head).
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_compile.codegen.cpp.template import (
    C_TYPES,
    constants,
    kernel,
    number,
    pointer,
    template_text,
)
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided
from aios_compile.ir.quant_format import E4M3_MAX

FLOATS = ("f32", "bf16", "f16")
LARGEST_CODE = {"i8": 127.0, "e4m3": E4M3_MAX}  # of the dtypes of caches of codes
HEADERS = {"i8": ("quantized.h",), "e4m3": ("quantized.h", "e4m3.h")}


@dataclass(frozen=True)
class Head:
    """One of q and k: where it is read, its norm (`eps` None: none) and whether it is rotated."""

    source: Strided
    eps: float | None = None
    weight: Strided | None = None
    rotated: bool = False


@dataclass(frozen=True)
class Rotation:
    """The tables of a rotary embedding."""

    cos: Strided
    sin: Strided
    interleaved: bool


@dataclass(frozen=True)
class Write:
    """The values, the slots and the caches of a KV write, and its outputs' positions.

    states: k cache, v cache and, of caches of codes, k scales and v scales; outputs: in that order.
    """

    value: Strided
    slots: Strided
    states: tuple[Strided, ...]
    outputs: tuple[int, ...]

    @property
    def k_cache(self) -> Strided:
        return self.states[0]

    @property
    def v_cache(self) -> Strided:
        return self.states[1]

    @property
    def k_output(self) -> int:
        return self.outputs[0]

    @property
    def v_output(self) -> int:
        return self.outputs[1]

    @property
    def in_codes(self) -> bool:
        """Return whether the caches hold codes, with scales."""
        return len(self.states) == 4

    @property
    def dtype(self) -> str:
        """Return the dtype of the caches."""
        return self.states[0].operand.dtype


@dataclass(frozen=True)
class HeadRowsSpec:
    """Everything the text depends on. `name` is the kernel's; `out` is (operand index, operand)."""

    name: str
    q: Head | None
    out: tuple[int, Operand] | None
    k: Head | None
    write: Write | None
    rotation: Rotation | None
    num_operands: int
    num_inputs: int
    lines: tuple[str, ...] = ()


def three_dimensional(view: Strided | None) -> Strided | None:
    """Return a view of float32 [T, H, D] with dense heads, else None; leading ones are dropped."""
    view = without_leading_ones(view, 3)
    if view is None or view.operand.dtype != "f32":
        return None
    return view if isinstance(view.operand.shape[1], int) and view.operand.strides[2] == 1 else None


def without_leading_ones(view: Strided | None, rank: int) -> Strided | None:
    """Return the view with leading dimensions of size 1 dropped down to `rank`, else None."""
    if view is None:
        return None
    shape, strides = view.operand.shape, view.operand.strides
    extra = len(shape) - rank
    if extra < 0 or any(s != 1 for s in shape[:extra]):
        return None
    operand = view.operand
    dropped = Operand(operand.name, operand.dtype, shape[extra:], strides[extra:], operand.packed)
    return Strided(view.index, dropped, view.offset)


def fits(spec: HeadRowsSpec) -> bool:
    """Return whether the template can serve the spec: dtypes, dense rows, cache layout."""
    heads = [h for h in (spec.q, spec.k) if h is not None]
    if len({h.source.operand.shape[2] for h in heads}) != 1:
        return False
    if any(h.weight and h.weight.operand.dtype not in FLOATS for h in heads):
        return False
    if spec.rotation is not None:
        tables = (spec.rotation.cos.operand, spec.rotation.sin.operand)
        if any(t.dtype != "f32" or t.strides[-1] != 1 for t in tables):
            return False
    if spec.out is not None and (spec.out[1].dtype != "f32" or spec.out[1].strides[-1] != 1):
        return False
    if spec.write is None:
        return True
    k, v = spec.write.k_cache.operand, spec.write.v_cache.operand
    page, width = v.shape[2:]
    return (
        k.dtype == v.dtype
        and k.dtype in (LARGEST_CODE if spec.write.in_codes else FLOATS)
        and k.strides[2:] == (page, 1)
        and v.strides[2:] == (width, 1)
        and all(state.offset == 0 for state in spec.write.states)
        and all(s.operand.strides[2] == 1 for s in spec.write.states[2:])
    )


def emit(spec: HeadRowsSpec) -> KernelSource:
    """Return the kernel's text; the caches are updated in place."""
    head = spec.q or spec.k
    assert head is not None
    tokens, _, width = head.source.operand.shape
    definitions = [constants(D=_int(width)), number("num_tokens", tokens), *_rotation(spec)]
    definitions += _head("Q", "q", spec.q) + _head("K", "k", spec.k)
    if spec.out is not None:
        index, out = spec.out
        while len(out.shape) > 3:
            out = Operand(out.name, out.dtype, out.shape[1:], out.strides[1:])
        definitions.append(pointer("out_at", index, out, ("t", "h")))
    else:
        definitions.append(_absent("out_at", "float", 2))
    definitions += _write(spec.write)
    inplace: tuple[tuple[int, int], ...] = ()
    if spec.write is not None:
        inplace = tuple(
            (output - spec.num_inputs, state.index)
            for output, state in zip(spec.write.outputs, spec.write.states)
        )
    in_codes = spec.write is not None and spec.write.in_codes
    return kernel(
        spec.name,
        spec,
        definitions,
        spec.num_operands,
        template="head_rows",
        inplace=inplace,
        lines=spec.lines,
        headers=HEADERS[spec.write.dtype] if spec.write is not None and in_codes else (),
    )


def _int(dim: Dim) -> int:
    assert isinstance(dim, int), f"{dim} is not a fixed size"
    return dim


def _absent(function: str, kind: str, indices: int) -> str:
    arguments = ", int64_t" * indices
    return (
        f"AIOS_INLINE {kind}* {function}(const Sizes*, void* const*{arguments}) "
        "{ return nullptr; }"
    )


def _rotation(spec: HeadRowsSpec) -> list[str]:
    if spec.rotation is None:
        absent = [_absent("cos_at", "float", 1), _absent("sin_at", "float", 1)]
        return [constants(ROTATED=0, INTERLEAVED=False), *absent]
    cos, sin = spec.rotation.cos, spec.rotation.sin
    return [
        constants(ROTATED=_int(cos.operand.shape[-1]), INTERLEAVED=spec.rotation.interleaved),
        pointer("cos_at", cos.index, cos.operand, ("t",), cos.offset),
        pointer("sin_at", sin.index, sin.operand, ("t",), sin.offset),
    ]


def _head(prefix: str, name: str, head: Head | None) -> list[str]:
    count = f"{'Q' if prefix == 'Q' else 'KV'}_HEADS"
    if head is None:
        values = {count: 0, f"{prefix}_NORM": False, f"{prefix}_ROTATION": False}
        absent = [_absent(f"{name}_at", "float", 2), _absent(f"{name}_weight", "float", 0)]
        return [constants(**values), constants(**{f"{prefix}_EPS": 0.0}), *absent]
    source, weight = head.source, head.weight
    lines = [
        constants(**{count: _int(source.operand.shape[1])}),
        constants(**{f"{prefix}_NORM": head.eps is not None, f"{prefix}_ROTATION": head.rotated}),
        constants(**{f"{prefix}_EPS": float(head.eps or 0.0)}),
        pointer(f"{name}_at", source.index, source.operand, ("t", "h"), source.offset),
    ]
    if weight is None:
        return [*lines, _absent(f"{name}_weight", "float", 0)]
    return [*lines, pointer(f"{name}_weight", weight.index, weight.operand, (), weight.offset)]


def _write(write: Write | None) -> list[str]:
    if write is None:
        absent = [("slot_at", "int64_t", 1), ("value_at", "float", 2)]
        absent += [("key_page", "KeyValue", 2), ("value_page", "KeyValue", 2)]
        lines = [_absent(*a) for a in absent]
        return [
            constants(PAGE=1, V_WIDTH=0),
            "using KeyValue = float;",
            *lines,
            template_text("put_floats"),
        ]
    k, v, slots, value = write.k_cache, write.v_cache, write.slots, write.value
    page, width = v.operand.shape[2:]
    k_output, v_output, *scale_outputs = write.outputs
    at = zip(("key_scales", "value_scales"), scale_outputs, write.states[2:])
    scales = [pointer(name, o, s.operand, ("page", "head")) for name, o, s in at]
    return [
        constants(PAGE=_int(page), V_WIDTH=_int(width)),
        f"using KeyValue = {C_TYPES[k.operand.dtype]};",
        pointer("slot_at", slots.index, slots.operand, ("t",), slots.offset),
        pointer("value_at", value.index, value.operand, ("t", "h"), value.offset),
        pointer("key_page", k_output, k.operand, ("page", "head")),
        pointer("value_page", v_output, v.operand, ("page", "head")),
        *scales,
        *([constants(LARGEST_CODE=LARGEST_CODE[k.operand.dtype])] if write.in_codes else []),
        template_text("put_codes" if scale_outputs else "put_floats"),
    ]
