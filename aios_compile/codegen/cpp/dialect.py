"""How C++ spells an expression: one dialect for a vector of lanes, one for a single element.

Both call the same functions of prelude.h by overloading, so a scalar gives the bits of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aios_compile.codegen.expression import (
    FLOATS,
    INFIX,
    Call,
    Const,
    Expr,
    Index,
    Load,
    Size,
    strip_parentheses,
    walk,
    wide,
)
from aios_compile.codegen.operand import dim_text
from aios_compile.errors import CodegenError

FUNCTIONS = {"abs": "absolute"}  # stdlib.h owns the name abs

POINTERS = {"f32": "float", "f64": "double", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t"}
POINTERS.update({"i8": "int8_t", "u8": "uint8_t", "bool": "bool8", "bf16": "bf16", "f16": "f16"})
SCALARS = {"f32": "float", "f64": "double", "i64": "int64_t", "bool": "bool"}
VECTORS = {"f32": "vf", "bf16": "vf", "f16": "vf", "i32": "vi", "bool": "vi"}


def vectorizable(exprs: Iterable[Expr]) -> bool:
    """Return whether every part of the expressions has a vector type (no int64, no double)."""
    return all(e.dtype in VECTORS or isinstance(e, Const) for expr in exprs for e in walk(expr))


def scalar_type(dtype: str) -> str:
    """Return the C++ type in which one element of `dtype` is computed."""
    return SCALARS.get(wide(dtype), "int32_t")


def number(const: Const) -> str:
    """Return a constant as C++ text; a float32 prints as its shortest round-trip decimal."""
    if const.dtype == "bool":
        return "true" if const.value else "false"
    if const.dtype not in FLOATS:
        text = f"INT64_C({const.value})" if const.dtype == "i64" else f"{const.value}"
        return f"({text})" if const.value < 0 else text
    if math.isnan(const.value):
        return "kNan" if wide(const.dtype) == "f32" else "(double)kNan"
    if math.isinf(const.value):
        return "kInfinity" if const.value > 0 else "(-kInfinity)"
    double = const.dtype == "f64"
    text = repr(const.value) if double else str(np.float32(const.value))
    if "inf" in text:  # beyond float32
        return "kInfinity" if const.value > 0 else "(-kInfinity)"
    text = text if any(c in text for c in ".e") else f"{text}.0"
    text = text if double else f"{text}f"
    return f"({text})" if text.startswith("-") else text


@dataclass(frozen=True)
class Cpp:
    """The C++ dialect. `vector`: texts are vf / vi values, else float, bool, int64_t and so on.

    `coordinates[d]` is the text of Index(d); `sizes` is the pointer to the runtime sizes.
    """

    vector: bool
    coordinates: tuple[str, ...] = ()
    sizes: str = "n->"

    def const(self, const: Const) -> str:
        return number(const)

    def index(self, index: Index) -> str:
        return self.coordinates[index.dim]

    def size(self, size: Size) -> str:
        return dim_text(size.dim, self.sizes)

    def declare(self, name: str, dtype: str, text: str) -> str:
        kind = VECTORS[dtype] if self.vector else scalar_type(dtype)
        return f"const {kind} {name} = {text};"

    def call(self, call: Call, texts: Sequence[str]) -> str:
        if call.op == "cast":
            return self._cast(call.args[0], call.dtype, texts[0])
        if call.op == "neg":
            return f"(-{texts[0]})"
        if call.op == "not":
            flag = not self.vector and call.dtype == "bool"
            return f"({'!' if flag else '~'}{texts[0]})"
        if call.op == "div" and isinstance(call.args[0], Const) and self.vector:
            return f"({self._splat(call.args[0], texts[0])} / {texts[1]})"
        if call.op in INFIX:
            texts = [
                self._splat(a, t) if a.dtype == "bool" else _plain(a, t)
                for a, t in zip(call.args, texts)
            ]
            return self._narrow(call, f"({texts[0]} {INFIX[call.op]} {texts[1]})")
        if call.dtype == "f64" and call.op not in ("abs", "max", "min", "select"):
            raise CodegenError(f"{call.op} in float64 has no C++ function: cast to float32 first")
        args = [self._splat(a, t) for a, t in zip(call.args, texts)]
        name = FUNCTIONS.get(call.op, call.op)
        return f"{name}({', '.join(strip_parentheses(a) for a in args)})"

    def _splat(self, arg: Expr, text: str) -> str:
        return (
            f"splat({strip_parentheses(text)})" if self.vector and isinstance(arg, Const) else text
        )

    def _narrow(self, call: Call, text: str) -> str:
        """Wrap 8- and 16-bit arithmetic, which C++ does in 32 bits."""
        if call.dtype in ("i8", "u8", "i16"):
            return f"(int32_t)({POINTERS[call.dtype]}){text}"
        return text

    def _cast(self, arg: Expr, dtype: str, text: str) -> str:
        bare = strip_parentheses(text)
        if dtype in ("bf16", "f16"):
            inner = text if wide(arg.dtype) == "f32" else self._cast(arg, "f32", text)
            return f"round_{dtype}({strip_parentheses(inner)})"
        source = wide(arg.dtype)
        if dtype == "bool":
            return f"({text} != {number(Const(0, source))})"
        if not self.vector:
            narrow = f"({POINTERS[dtype]})" if dtype in ("i8", "u8", "i16") else ""
            return f"({scalar_type(dtype)}){narrow}({bare})"
        if source == "bool":
            whole = f"({text} & 1)"
            return whole if dtype == "i32" else f"to_float{whole}"
        return f"to_float({bare})" if dtype == "f32" else f"to_int({bare})"


def _plain(arg: Expr, text: str) -> str:
    """Return a small int64 constant as a plain number: the other side is 64 bits wide already."""
    if isinstance(arg, Const) and arg.dtype == "i64" and 0 <= arg.value < 2**31:
        return str(arg.value)
    return text


VECTOR = Cpp(vector=True)
SCALAR = Cpp(vector=False)


def operands_of(exprs: Iterable[Expr]) -> tuple[int, ...]:
    """Return the indices of all loads, in order."""
    return tuple(sorted({e.index for x in exprs for e in walk(x) if isinstance(e, Load)}))
