"""What every C++ kernel file has around its loops: a comment that explains it, the C interface."""

from __future__ import annotations

from collections.abc import Sequence

from aios_compile.codegen.cpp.dialect import POINTERS
from aios_compile.codegen.naming import variable
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


def pointer(operand: Operand, index: int, output: bool) -> str:
    """Return the declaration of operand `index`'s pointer."""
    kind = POINTERS[operand.dtype] if output else f"const {POINTERS[operand.dtype]}"
    return f"{kind}* {variable(operand, index)} = ({kind}*)p[{index}];"


def dim_c(dim: Dim) -> str:
    """Return a dimension as C text; small numbers stay plain."""
    return str(dim) if isinstance(dim, int) and abs(dim) < 2**31 else dim_text(dim)


def indent(lines: Sequence[str], depth: int = 1) -> list[str]:
    return [f"{'  ' * depth}{line}" if line else "" for line in lines]
