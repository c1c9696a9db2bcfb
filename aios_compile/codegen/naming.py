"""Names in generated code, the same for both targets, and what comments call an operand."""

from __future__ import annotations

import hashlib
import re

from aios_compile.codegen.operand import Dim, Operand


def symbol_of(name: str, spec: object) -> str:
    """Return the C symbol of a kernel: its name and ten hex digits of its spec."""
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:10]
    return f"aios_{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{digest}"


def variable(operand: Operand, index: int) -> str:
    """Return the C name of operand `index`; the number keeps it apart from every other name."""
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', operand.name).strip('_') or 'x'}_{index}"


def layout(operand: Operand) -> str:
    """Return an operand's dtype, sizes and strides for people, e.g. `x f32[T, 64]`."""
    sizes = ", ".join(dim_name(d) for d in operand.shape)
    text = f"{operand.name} {operand.dtype}[{sizes}]"
    if operand.packed:
        return f"{text} packed {operand.packed}"
    if not operand.is_contiguous():
        text += f" strides [{', '.join(dim_name(d) for d in operand.strides)}]"
    return text


def dim_name(dim: Dim) -> str:
    """Return a dimension for people, e.g. `2*T`."""
    return (
        str(dim)
        if isinstance(dim, int)
        else re.sub(r"INT64_C\((-?\d+)\)", r"\1", dim.text(""))[1:-1]
    )
