"""What every C++ kernel file has around its loops: a comment that explains it, the C interface."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from aios_compile.codegen.cpp.dialect import POINTERS
from aios_compile.codegen.operand import Dim, Operand, dim_text

TEMPLATE = """\
{comment}
#include "prelude.h"

extern "C" int64_t {symbol}_items(const Sizes* n) {{
  (void)n;
  return {items};
}}

extern "C" void {symbol}(const Sizes* n, void* const* p, int64_t begin, int64_t end) {{
  (void)n;
{body}
}}
"""


def frame(
    symbol: str,
    comment: Sequence[str],
    items: str,
    body: Sequence[str],
) -> str:
    """Return the text of a kernel file. `body` handles the items [begin, end)."""
    return TEMPLATE.format(
        symbol=symbol,
        comment="\n".join(f"// {line}".rstrip() for line in comment),
        items=items,
        body="\n".join(f"  {line}" if line else "" for line in body),
    )


def symbol_of(name: str, spec: object) -> str:
    """Return the C symbol of a kernel: its name and ten hex digits of its spec."""
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:10]
    return f"aios_{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{digest}"


def variable(operand: Operand, index: int) -> str:
    """Return the C name of operand `index`; the number keeps it apart from every other name."""
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', operand.name).strip('_') or 'x'}_{index}"


def pointer(operand: Operand, index: int, output: bool) -> str:
    """Return the declaration of operand `index`'s pointer."""
    kind = POINTERS[operand.dtype] if output else f"const {POINTERS[operand.dtype]}"
    return f"{kind}* {variable(operand, index)} = ({kind}*)p[{index}];"


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


def dim_c(dim: Dim) -> str:
    """Return a dimension as C text; small numbers stay plain."""
    return str(dim) if isinstance(dim, int) and abs(dim) < 2**31 else dim_text(dim)


def indent(lines: Sequence[str], depth: int = 1) -> list[str]:
    return [f"{'  ' * depth}{line}" if line else "" for line in lines]
