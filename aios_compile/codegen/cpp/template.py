"""Assemble one kernel's C++ text: model lines, prelude, definitions, template, the two C functions.

Templates are C++ files in templates/; what varies is defined before them as constants and small
functions, so a kernel's text reads top to bottom without holes. Everything stands in an anonymous
namespace: kernels are linked into one library, and equal names with unequal constants must not
merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from aios_compile.codegen.operand import Dim, Operand, dim_text
from aios_compile.codegen.source import Candidate, KernelSource

C_TYPES = {
    "f32": "float",
    "f64": "double",
    "bf16": "bf16",
    "f16": "f16",
    "i64": "int64_t",
    "i32": "int32_t",
    "i8": "int8_t",
    "u8": "uint8_t",
    "e4m3": "e4m3",
}

FINISH = """\
extern "C" int64_t {symbol}_finish_items(const Sizes* n, void* const* p) {{
  return {function}_finish_items(n, p);
}}
extern "C" void {symbol}_finish(const Sizes* n, void* const* p, int64_t begin, int64_t end) {{
  {function}_finish(n, p, begin, end);
}}
"""

CANDIDATE = """\
// {name}, for {least} to {most} tokens: {what}
extern "C" void {symbol}_{name}(const Sizes* n, void* const* p, int64_t begin, int64_t end) {{
  {function}<{type}>(n, p, begin, end);
}}
extern "C" int64_t {symbol}_{name}_finish_items(const Sizes* n, void* const* p) {{
  return {function}_finish_items<{type}>(n, p);
}}
extern "C" void {symbol}_{name}_finish(const Sizes* n, void* const* p, int64_t begin,
                                       int64_t end) {{
  {function}_finish<{type}>(n, p, begin, end);
}}
"""


def symbol_of(name: str, spec: object) -> str:
    """Return the C symbol of a kernel: its name and ten hex digits of its spec."""
    return f"aios_{name}_{hashlib.sha256(repr(spec).encode()).hexdigest()[:10]}"


def offset_text(strides: Sequence[Dim], indices: Sequence[str], constant: Dim = 0) -> str:
    """Return the C text of constant + sum of index * stride, in elements, without zero terms."""
    terms = [] if constant == 0 else [dim_text(constant)]
    for stride, index in zip(strides, indices):
        if stride == 1:
            terms.append(index)
        elif stride != 0:
            terms.append(f"{index} * {dim_text(stride)}")
    return " + ".join(terms) or "0"


def pointer(
    function: str, position: int, operand: Operand, indices: Sequence[str], constant: Dim = 0
) -> str:
    """Return a C function `function(n, p, indices...)` that gives the address of an element.

    Dimensions behind the last index start at 0.
    """
    kind = C_TYPES[operand.dtype]
    arguments = "".join(f", int64_t {i}" for i in indices)
    offset = offset_text(operand.strides, indices, constant)
    return (
        f"AIOS_INLINE {kind}* {function}(const Sizes* n, void* const* p{arguments}) {{\n"
        f"  return ({kind}*)p[{position}] + {offset};\n}}"
    )


def number(function: str, dim: Dim) -> str:
    """Return a C function of the sizes that gives a dimension."""
    return f"AIOS_INLINE int64_t {function}(const Sizes* n) {{ return {dim_text(dim)}; }}"


def constants(**values: int | float | bool) -> str:
    """Return constexpr definitions; floats are written exactly (hexadecimal)."""
    lines = []
    for name, value in values.items():
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, int):
            lines.append(f"constexpr int64_t {name} = {value};")
        else:
            lines.append(f"constexpr float {name} = {float(value).hex()}f;  // {value!r}")
    return "\n".join(lines)


def template_text(name: str) -> str:
    """Return the text of a file of templates/."""
    return (Path(__file__).parent / "templates" / f"{name}.h").read_text()


def kernel(
    name: str,
    spec: object,
    definitions: Sequence[str],
    num_operands: int,
    *,
    template: str | None = None,
    inplace: tuple[tuple[int, int], ...] = (),
    lines: tuple[str, ...] = (),
    headers: Sequence[str] = (),
    finishes: bool = False,
    candidates: tuple[Candidate, ...] = (),
) -> KernelSource:
    """Return the kernel whose template defines `<name>_items(n)` and `<name>(n, p, begin, end)`.

    finishes: and `<name>_finish_items(n, p)` and `<name>_finish(n, p, begin, end)`. candidates: the
    last three are templates of the candidates' structs; each gets functions `<symbol>_<name>...`.
    """
    symbol, function = symbol_of(name, spec), template or name
    body = template_text(function)
    sources = "".join(f"//   {line}\n" for line in lines)
    # the prelude first, by itself: that is where a precompiled one is looked for
    includes = "".join(f'#include "{name}"\n' for name in dict.fromkeys(("prelude.h", *headers)))
    text = (
        f"// {symbol}\n{'// computes' + chr(10) + sources if lines else ''}"
        f"{includes}\nnamespace {{\n\n"
        + "\n".join(definitions)
        + f"\n\n{body}\n}}  // namespace\n\n"
        f'extern "C" int64_t {symbol}_items(const Sizes* n) {{ return {function}_items(n); }}\n'
        f'extern "C" void {symbol}(const Sizes* n, void* const* p, int64_t begin, int64_t end) {{\n'
        f"  {function}(n, p, begin, end);\n}}\n"
    )
    if finishes:
        text += FINISH.format(symbol=symbol, function=function)
    for candidate in candidates:
        text += CANDIDATE.format(symbol=symbol, function=function, **vars(candidate))
    return KernelSource(
        name,
        symbol,
        "cpp",
        text,
        num_operands,
        inplace,
        lines,
        finishes=finishes,
        candidates=candidates,
    )
