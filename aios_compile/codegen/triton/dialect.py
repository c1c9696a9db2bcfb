"""How Triton spells an expression; frame.py is what a module has around its kernels.

Texts are blocks of BLOCK elements or scalars; arithmetic is in float32 as on the C++ target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.access import Access, Leaf, varies
from aios_compile.codegen.expression import (
    FLOATS,
    INFIX,
    Call,
    Const,
    Expr,
    Index,
    Load,
    Printer,
    Size,
    strip_parentheses,
    walk,
)
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.triton.frame import (
    Launch,
    Variant,
    module_text,
    python_dim,
    signature,
)
from aios_compile.errors import CodegenError

DIVISIONS = {"trunc_divide": "//", "fmod": "%"}  # Triton's, of whole numbers by no zero
ROUNDINGS = ("floor", "ceil", "round", "trunc")
EXACT = ("neg", "relu")  # formulas of every type; the others are float32's
FUNCTIONS = ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil", "erf", "abs")
# Compositions that Triton's language lacks; {0} is the argument.
FORMULAS = {
    "neg": "(-{0})",
    "rsqrt": "(1.0 / tl.sqrt({0}))",
    "sigmoid": "(1.0 / (1.0 + tl.exp(-{0})))",
    "silu": "({0} / (1.0 + tl.exp(-{0})))",
    "relu": "tl.maximum({0}, 0, propagate_nan=tl.PropagateNan.ALL)",
    "expm1": "exp_minus_1({0})",
    "log1p": "log_of_1_plus({0})",
    "log10": "log_10({0})",
    "tanh": "tanh({0})",
    "tan": "tangent({0})",
    "sinh": "hyperbolic_sine({0})",
    "cosh": "hyperbolic_cosine({0})",
    "asin": "arcsine({0})",
    "acos": "arccosine({0})",
    "atan": "arctangent({0})",
    "atan2": "arctangent2({0}, {1})",
    "gelu": "(0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476)))",
    # 0.5 (1 + tanh(u)) = sigmoid(2u)
    "gelu_tanh": "({0} / (1.0 + tl.exp({0} * (-1.5957692 - 0.07135482 * {0} * {0}))))",
    "trunc": "toward_zero({0})",
    "round": "to_nearest({0})",
}
TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64", "bool": "int1"}
TYPES.update({"i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8"})


@dataclass(frozen=True)
class Triton:
    """The Triton dialect; `i0`, `i1`, ... are the coordinates."""

    def const(self, const: Const) -> str:
        if isinstance(const.value, float) and not math.isfinite(const.value):
            return f'float("{const.value}")'
        return f"({const.value!r})" if const.value < 0 else repr(const.value)

    def index(self, index: Index) -> str:
        return f"i{index.dim}"

    def size(self, size: Size) -> str:
        return python_dim(size.dim)

    def declare(self, name: str, dtype: str, text: str) -> str:
        return f"{name} = {text}"

    def call(self, call: Call, texts: Sequence[str]) -> str:
        if call.op in ("and", "or", "xor") and call.dtype == "bool":
            # as numbers: the interpreter takes a scalar comparison beside a block for a float
            left, right = (f"tl.cast({strip_parentheses(t)}, tl.int32)" for t in texts)
            return f"(({left} {INFIX[call.op]} {right}) != 0)"
        if call.op in INFIX:
            return f"({texts[0]} {INFIX[call.op]} {texts[1]})"
        if call.op == "cast":
            return self._cast(call, texts[0])
        if call.op == "not":
            return f"({texts[0]} == 0)" if call.dtype == "bool" else f"(~{texts[0]})"
        if call.op == "select":
            return f"tl.where({', '.join(texts)})"
        if call.op in ("max", "min"):
            nan = ", propagate_nan=tl.PropagateNan.ALL" if call.dtype == "f32" else ""
            return f"tl.{call.op}imum({', '.join(texts)}{nan})"
        if call.op in ("pow", "floor_divide", "remainder", *DIVISIONS):
            return self._of_two(call, texts)
        if call.op in ROUNDINGS and call.dtype not in FLOATS:
            return texts[0]
        if call.op in FUNCTIONS:
            return f"tl.{call.op}({texts[0]})"
        if call.op in FORMULAS:
            _refuse_double(call, EXACT)
            return FORMULAS[call.op].format(*texts)
        raise CodegenError(f"the Triton dialect has no {call.op}")

    def _of_two(self, call: Call, texts: Sequence[str]) -> str:
        """Return a power or a division with a whole result."""
        _refuse_double(call)
        if call.dtype in FLOATS:
            return f"float_{call.op}({', '.join(texts)})"
        known = isinstance(call.args[1], Size) or (
            isinstance(call.args[1], Const) and call.args[1].value != 0
        )
        if known and call.op in DIVISIONS:
            return f"({texts[0]} {DIVISIONS[call.op]} {texts[1]})"
        text = f"whole_{call.op}({', '.join(texts)})"
        return text if call.dtype == "i64" else f"{text}.to(tl.{TYPES[call.dtype]})"

    def _cast(self, call: Call, text: str) -> str:
        if call.dtype == "bool":
            return f"({text} != 0)"
        if call.dtype in ("bf16", "f16"):
            return f"({text}).to(tl.{TYPES[call.dtype]}).to(tl.float32)"
        return f"({text}).to(tl.{TYPES[call.dtype]})"


def _refuse_double(call: Call, besides: Sequence[str] = ()) -> None:
    if call.dtype == "f64" and call.op not in besides:
        raise CodegenError(f"{call.op} in float64 has no Triton text: cast to float32 first")


@dataclass
class Texts:
    """The texts of loads and addresses of a kernel. `names[i]`: text of a leaf that is reduced."""

    operands: Sequence[Operand]
    leaves: Sequence[Leaf]
    inner: int
    names: dict[int, str]

    def address(self, linear: Linear) -> str:
        expr = linear.expr()
        return Printer(Triton()).text(expr, self.loads([expr]))

    def loads(self, exprs: Sequence[Expr]) -> list[str]:
        texts = [""] * len(self.leaves)
        for expr in exprs:
            for e in walk(expr):
                if isinstance(e, Load):
                    texts[e.index] = self._load(e.index)
        return texts

    def _load(self, index: int) -> str:
        leaf = self.leaves[index]
        if not isinstance(leaf, Access):
            return self.names[index]
        operand = self.operands[leaf.operand]
        address = self.address(leaf.address)
        moves = any(varies(a, self.leaves, self.inner) for a in leaf.address.atoms())
        mask = ", mask=mask, other=0" if moves else ""
        text = f"tl.load({variable(operand, leaf.operand)} + {address}{mask})"
        return f"{text}.to(tl.float32)" if operand.dtype in ("bf16", "f16") else text

    def store(self, operand: int, address: Linear, value: str) -> str:
        moves = address.coefficient(self.inner) != 0
        mask = ", mask=mask" if moves else ""
        place = f"{variable(self.operands[operand], operand)} + {self.address(address)}"
        return f"tl.store({place}, {value}{mask})"


def coordinates(shape: Sequence[Dim], item: str) -> list[str]:
    """Return the lines that turn the row number `item` into the outer coordinates."""
    lines, rest = [], item
    for dim in reversed(range(len(shape) - 1)):
        size = python_dim(shape[dim])
        lines.append(f"i{dim} = {rest} % {size}" if dim else f"i{dim} = {rest}")
        rest = f"({rest} // {size})"
    return lines


def module(
    symbol: str, comment: Sequence[str], operands: Sequence[Operand], body: Sequence[str],
    items: str, blocks: Sequence[int], size: Dim = 1,
) -> str:  # fmt: skip
    """Return the text of a module of one kernel with one program an item.

    `blocks`: the values of BLOCK, ascending; the first that holds `size` runs, or the only one.
    """
    head = signature(symbol, operands, ("BLOCK",))
    kernel = "\n".join([*head, *(f"    {line}" for line in body)])
    variants = [
        Variant(None if len(blocks) == 1 else block, (Launch(symbol, items, (("BLOCK", block),)),))
        for block in blocks
    ]
    return module_text(comment, operands, [kernel], variants, size)
