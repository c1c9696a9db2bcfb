"""Expressions: the mathematics of one element, built from FX nodes and printed in any dialect.

A tree of Load, Const, Index, Size and Call. `pointwise_ops.py` builds it from pointwise ATen nodes,
with torch's type promotion made explicit as casts; `evaluate` runs it in torch (the reference), and
a Printer turns it into kernel text::

    printer = Printer(VECTOR)             # codegen/cpp/dialect.py, codegen/triton/dialect.py
    printer.text(expr, ["x", "weight"])   # one expression; loads[i] is the text of Load(i)
    lines, results = printer.statements(exprs, loads)   # shared parts become variables

A load's text has the arithmetic type of its dtype: float32 for f32, bf16, f16; a mask for bool.
Half precision exists only as `cast` to "bf16" or "f16": the value is rounded and stays a float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aios_compile.codegen.operand import Dim

LINE = 72  # longer texts are cut into variables
FLOATS = ("f32", "bf16", "f16", "f64")
HALVES = ("bf16", "f16")
# The operators that C++ and Python spell alike.
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">"}
INFIX.update({"ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^"})
INFIX.update({"shift_left": "<<", "shift_right": ">>"})
TORCH_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Load:
    """The element of input `index` at the point that is computed."""

    index: int
    dtype: str = "f32"


@dataclass(frozen=True)
class Const:
    """A number. The text of a float32 constant is its shortest round-trip decimal."""

    value: float
    dtype: str = "f32"

    def __eq__(self, other: object) -> bool:  # -0.0 is not 0.0, and NaN is NaN
        return isinstance(other, Const) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Index:
    """The coordinate along dimension `dim` of the iteration space; int64."""

    dim: int
    dtype: str = "i64"


@dataclass(frozen=True)
class Size:
    """A runtime size, such as the number of tokens; int64."""

    dim: Dim
    dtype: str = "i64"


@dataclass(frozen=True)
class Call:
    """An operation of the table EVALUATE; `dtype` is the type of its result."""

    op: str
    args: tuple[Expr, ...]
    dtype: str = "f32"


Expr = Load | Const | Index | Size | Call


def wide(dtype: str) -> str:
    """Return the dtype of arithmetic: float32 for half precision, else the dtype itself."""
    return "f32" if dtype in HALVES else dtype


def cast(expr: Expr, dtype: str) -> Expr:
    """Return `expr` converted to `dtype`; nothing is added where the value cannot change."""
    if expr.dtype == dtype or (expr.dtype in HALVES and dtype == "f32"):
        return expr
    return call("cast", (expr,), dtype)


def call(op: str, args: Sequence[Expr], dtype: str) -> Expr:
    """Return a Call, computed now when every argument is a number."""
    made = Call(op, tuple(args), dtype)
    if all(isinstance(a, Const) for a in made.args):
        return Const(evaluate(made, ()).item(), dtype)
    return made


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield every node of the tree once, arguments before their users."""
    seen: set[Expr] = set()

    def visit(e: Expr) -> Iterator[Expr]:
        if e in seen:
            return
        seen.add(e)
        if isinstance(e, Call):
            for arg in e.args:
                yield from visit(arg)
        yield e

    yield from visit(expr)


def substitute(expr: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """Return the tree with each node for which `change` gives a replacement (outermost first)."""
    memo: dict[Expr, Expr] = {}

    def visit(e: Expr) -> Expr:
        if e not in memo:
            new = change(e)
            if new is None:
                new = Call(e.op, tuple(map(visit, e.args)), e.dtype) if isinstance(e, Call) else e
            memo[e] = new
        return memo[e]

    return visit(expr)


# ---- reference -----------------------------------------------------------------------------------

TORCH_NAMES = (
    *("neg", "abs", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "erf"),
    *("floor", "ceil", "round", "trunc", "eq", "ne", "lt", "le", "gt", "ge"),
)
EVALUATE: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floor_divide": torch.floor_divide,
    "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "max": torch.maximum,
    "min": torch.minimum,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shift_left": torch.bitwise_left_shift,
    "shift_right": torch.bitwise_right_shift,
    "not": torch.bitwise_not,
    "select": torch.where,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    **{name: getattr(torch, name) for name in TORCH_NAMES},
}


def evaluate(
    expr: Expr, tensors: Sequence[Tensor], sizes: Mapping[str, int] | None = None
) -> Tensor:
    """Compute the expression in torch. `tensors[i]` is Load(i); shapes broadcast.

    Index has no meaning here: substitute it first.
    """
    memo: dict[Expr, Tensor] = {}
    for e in walk(expr):
        if isinstance(e, Load):
            memo[e] = tensors[e.index].to(TORCH_DTYPES[wide(e.dtype)])
        elif isinstance(e, Const):
            memo[e] = torch.tensor(e.value, dtype=TORCH_DTYPES[e.dtype])
        elif isinstance(e, Size):
            assert sizes is not None or isinstance(e.dim, int), "a runtime size needs `sizes`"
            value = e.dim if isinstance(e.dim, int) else e.dim.value(sizes or {})
            memo[e] = torch.tensor(value)
        else:
            assert isinstance(e, Call), f"{e} cannot be evaluated"
            args = [memo[a] for a in e.args]
            if e.op == "cast":
                memo[e] = args[0].to(TORCH_DTYPES[e.dtype]).to(TORCH_DTYPES[wide(e.dtype)])
            else:
                memo[e] = EVALUATE[e.op](*args).to(TORCH_DTYPES[e.dtype])
    return memo[expr]


# ---- printing ------------------------------------------------------------------------------------


class Dialect(Protocol):
    """How one target language spells an expression."""

    def const(self, const: Const) -> str: ...
    def index(self, index: Index) -> str: ...
    def size(self, size: Size) -> str: ...
    def call(self, call: Call, texts: Sequence[str]) -> str: ...
    def declare(self, name: str, dtype: str, text: str) -> str: ...


class Printer:
    """Print expressions in a dialect. Infix texts come in parentheses."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def text(self, expr: Expr, loads: Sequence[str]) -> str:
        """Return `expr` as one nested text; loads[i] is the text of Load(i)."""
        texts: dict[Expr, str] = {}
        for e in walk(expr):
            texts[e] = self._one(e, texts, loads)
        return strip_parentheses(texts[expr])

    def statements(
        self, exprs: Sequence[Expr], loads: Sequence[str], prefix: str = "v"
    ) -> tuple[list[str], list[str]]:
        """Return (declarations of what is shared or long, the text of each expression)."""
        uses: dict[Expr, int] = {}
        order: dict[Expr, None] = {}
        for expr in exprs:
            uses[expr] = uses.get(expr, 0) + 1
            for e in walk(expr):
                if e not in order and isinstance(e, Call):
                    for arg in e.args:
                        uses[arg] = uses.get(arg, 0) + 1
                order[e] = None
        texts: dict[Expr, str] = {}
        lines: list[str] = []
        for e in order:
            texts[e] = self._one(e, texts, loads)
            if isinstance(e, Call) and (uses[e] > 1 or len(texts[e]) > LINE):
                name = f"{prefix}{len(lines)}"
                lines.append(self.dialect.declare(name, e.dtype, strip_parentheses(texts[e])))
                texts[e] = name
        return lines, [strip_parentheses(texts[e]) for e in exprs]

    def _one(self, e: Expr, texts: Mapping[Expr, str], loads: Sequence[str]) -> str:
        if isinstance(e, Load):
            return loads[e.index]
        if isinstance(e, Const):
            return self.dialect.const(e)
        if isinstance(e, Index):
            return self.dialect.index(e)
        if isinstance(e, Size):
            return self.dialect.size(e)
        return self.dialect.call(e, [texts[a] for a in e.args])


def strip_parentheses(text: str) -> str:
    """Remove one pair of parentheses that encloses the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


def formula(expr: Expr, names: Sequence[str]) -> str:
    """Return the expression as mathematics for people, e.g. `silu(gate) * up`."""
    return Printer(_Formula()).text(expr, names)


class _Formula:
    INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">"}
    INFIX.update({"ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^"})

    def const(self, const: Const) -> str:
        return f"{const.value:.7g}" if isinstance(const.value, float) else str(const.value)

    def index(self, index: Index) -> str:
        return f"i{index.dim}"

    def size(self, size: Size) -> str:
        return str(size.dim) if isinstance(size.dim, int) else size.dim.text("")

    def call(self, call: Call, texts: Sequence[str]) -> str:
        if call.op in self.INFIX:
            return f"({texts[0]} {self.INFIX[call.op]} {texts[1]})"
        return f"{call.dtype if call.op == 'cast' else call.op}({', '.join(texts)})"

    def declare(self, name: str, dtype: str, text: str) -> str:
        return f"{name} = {text}"
