"""The rules from pointwise ATen nodes to expressions, with torch's type promotion made explicit.

The dtype of arithmetic is the dtype of the node's value (float32 for half precision, whose result
is rounded, as eager does), and for comparisons the promoted dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.expression import (
    FLOATS,
    Call,
    Const,
    Expr,
    Size,
    call,
    cast,
    wide,
)
from aios_compile.codegen.operand import DTYPE_NAMES, dim_of

Rule = Callable[..., Expr]
RULES: dict[str, Rule] = {}

UNARY = (
    *("neg", "abs", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "erf", "sigmoid"),
    *("silu", "relu", "floor", "ceil", "trunc"),
)
BINARY = {
    "minimum": "min",
    "maximum": "max",
    "remainder": "remainder",
    "fmod": "fmod",
    "floor_divide": "floor_divide",
    "atan2": "atan2",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_left_shift": "shift_left",
    "bitwise_right_shift": "shift_right",
    "__and__": "and",
    "__or__": "or",
    "__xor__": "xor",
    "__lshift__": "shift_left",
    "__rshift__": "shift_right",
}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
IDENTITY = ("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "_to_copy")


def dtype_of(value: Any) -> str:
    """Return the name of a tensor's dtype, or the dtype that torch gives a Python number."""
    if isinstance(value, torch.Tensor):
        return DTYPE_NAMES[str(value.dtype)]
    return "bool" if isinstance(value, bool) else "f32" if isinstance(value, float) else "i64"


def op_name(node: fx.Node) -> str:
    """Return `namespace::name` without the overload, or "" for a node that calls no operator."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None and node.op == "call_function" else ""


def is_pointwise(node: fx.Node) -> bool:
    """Return whether a rule exists for the node."""
    return op_name(node) in RULES and isinstance(node.meta.get("val"), torch.Tensor)


def pointwise(node: fx.Node, operand: Callable[[fx.Node], Expr]) -> Expr | None:
    """Return the expression of a pointwise node; `operand` gives those of its tensor arguments.

    Returns None when no rule knows the operator.
    """
    if not is_pointwise(node):
        return None
    builder = Builder(node, operand)
    return cast(RULES[op_name(node)](builder, *node.args, **node.kwargs), builder.out)


class Builder:
    """What a rule needs: the result's dtype (`out`), that of arithmetic (`dtype`), arguments."""

    def __init__(self, node: fx.Node, operand: Callable[[fx.Node], Expr]) -> None:
        self.node = node
        self.operand = operand
        self.out = dtype_of(node.meta["val"])
        self.dtype = wide(self.out)

    def value(self, arg: Any) -> Expr:
        """Return an argument in its own dtype."""
        if isinstance(arg, fx.Node):
            value = arg.meta["val"]
            return self.operand(arg) if isinstance(value, torch.Tensor) else Size(dim_of(value))
        return Const(arg, dtype_of(arg))

    def x(self, arg: Any, dtype: str | None = None) -> Expr:
        """Return an argument in the dtype of arithmetic."""
        to = dtype or self.dtype
        if isinstance(arg, (bool, int, float)):
            return Const(_number(arg, to), to)
        return cast(self.value(arg), to)

    def call(self, op: str, *args: Expr, dtype: str | None = None) -> Expr:
        return call(op, args, dtype or self.dtype)

    def number(self, value: float) -> Const:
        return Const(_number(value, self.dtype), self.dtype)

    def promoted(self, x: Any, y: Any) -> str:
        """Return the dtype in which torch compares the arguments."""
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in (x, y)]
        values = [v if isinstance(v, (torch.Tensor, bool, int, float)) else 1 for v in values]
        dtype = torch.result_type(*values)
        return wide(DTYPE_NAMES[str(dtype)])


def _number(value: float, dtype: str) -> float:
    if dtype in FLOATS:
        return float(value)
    return bool(value) if dtype == "bool" else int(value)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _register_tables() -> None:
    for name in UNARY:
        RULES[f"aten::{name}"] = lambda b, x, *, _op=name, **_: b.call(_op, b.x(x))
    for name, op in BINARY.items():
        RULES[f"aten::{name}"] = lambda b, x, y, *, _op=op: b.call(_op, b.x(x), b.x(y))
    for name in COMPARISONS:
        RULES[f"aten::{name}"] = lambda b, x, y, *, _op=name: _compare(b, _op, x, y)
    for name in IDENTITY:
        RULES[f"aten::{name}"] = lambda b, x, **_: b.value(x)
    RULES["prims::convert_element_type"] = lambda b, x, _dtype: b.value(x)
    for name, op in {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}.items():
        RULES[f"aten::{name}"] = lambda b, x, y, *, _op=op: b.call(
            _op, b.x(x, "bool"), b.x(y, "bool"), dtype="bool"
        )


_register_tables()


def _compare(b: Builder, op: str, x: Any, y: Any) -> Expr:
    dtype = b.promoted(x, y)
    return b.call(op, b.x(x, dtype), b.x(y, dtype), dtype="bool")


def _scaled(b: Builder, y: Any, alpha: float) -> Expr:
    return b.x(y) if alpha == 1 else b.call("mul", b.x(y), b.number(alpha))


@rule("add")
def _add(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Expr:
    if b.dtype == "bool":
        return b.call("or", b.x(x), b.x(y))
    return b.call("add", b.x(x), _scaled(b, y, alpha))


@rule("sub")
def _sub(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Expr:
    return b.call("sub", b.x(x), _scaled(b, y, alpha))


@rule("rsub")
def _rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Expr:
    return b.call("sub", b.x(y), _scaled(b, x, alpha))


@rule("mul")
def _mul(b: Builder, x: Any, y: Any) -> Expr:
    return b.call("and" if b.dtype == "bool" else "mul", b.x(x), b.x(y))


@rule("div", "true_divide")
def _div(b: Builder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Expr:
    op = {None: "div", "floor": "floor_divide", "trunc": "trunc_divide"}[rounding_mode]
    return b.call(op, b.x(x), b.x(y))


@rule("round")
def _round(b: Builder, x: Any, *, decimals: int = 0) -> Expr:
    if decimals == 0:
        return b.call("round", b.x(x))
    power, (up, down) = (
        b.number(10 ** abs(decimals)),
        ("mul", "div") if decimals > 0 else ("div", "mul"),
    )
    return b.call(down, b.call("round", b.call(up, b.x(x), power)), power)


@rule("reciprocal")
def _reciprocal(b: Builder, x: Any) -> Expr:
    return b.call("div", b.number(1), b.x(x))


@rule("square")
def _square(b: Builder, x: Any) -> Expr:
    return b.call("mul", b.x(x), b.x(x))


@rule("pow")
def _pow(b: Builder, x: Any, y: Any) -> Expr:
    """The exponents that eager treats specially give the same operations here."""
    base, one = b.x(x), b.number(1)
    if isinstance(y, (int, float)) and b.dtype in FLOATS:
        square = b.call("mul", base, base)
        special: dict[float, Callable[[], Expr]] = {
            0.0: lambda: one,
            1.0: lambda: base,
            2.0: lambda: square,
            3.0: lambda: b.call("mul", square, base),
            0.5: lambda: b.call("sqrt", base),
            -0.5: lambda: b.call("rsqrt", base),
            -1.0: lambda: b.call("div", one, base),
            -2.0: lambda: b.call("div", one, square),
        }
        if float(y) in special:
            return special[float(y)]()
    return b.call("pow", base, b.x(y))


@rule("sign", "sgn")
def _sign(b: Builder, x: Any) -> Expr:
    v, zero = b.x(x), b.number(0)
    if b.dtype == "bool":
        return v
    positive = cast(b.call("gt", v, zero, dtype="bool"), b.dtype)
    return b.call("sub", positive, cast(b.call("lt", v, zero, dtype="bool"), b.dtype))


@rule("isnan")
def _isnan(b: Builder, x: Any) -> Expr:
    v = b.value(x)
    return b.call("ne", v, v, dtype="bool")


@rule("isinf")
def _isinf(b: Builder, x: Any) -> Expr:
    dtype = b.promoted(x, 1.0)
    size = b.call("abs", b.x(x, dtype), dtype=dtype)
    return b.call("eq", size, Const(math.inf, dtype), dtype="bool")


@rule("logical_not")
def _logical_not(b: Builder, x: Any) -> Expr:
    return b.call("not", b.x(x, "bool"), dtype="bool")


@rule("bitwise_not")
def _bitwise_not(b: Builder, x: Any) -> Expr:
    return b.call("not", b.x(x))


@rule("where")
def _where(b: Builder, condition: Any, x: Any, y: Any) -> Expr:
    return b.call("select", b.x(condition, "bool"), b.x(x), b.x(y))


@rule("masked_fill")
def _masked_fill(b: Builder, x: Any, mask: Any, value: Any) -> Expr:
    return b.call("select", b.x(mask, "bool"), b.x(value), b.x(x))


@rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(b: Builder, x: Any, low: Any = None, high: Any = None, **named: Any) -> Expr:
    name = op_name(b.node)
    if name == "aten::clamp_max":
        low, high = None, low
    if name == "aten::hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    low, high = named.get("min", low), named.get("max", high)
    v = b.x(x)
    v = v if low is None else b.call("max", v, b.x(low))
    return v if high is None else b.call("min", v, b.x(high))


@rule("leaky_relu")
def _leaky_relu(b: Builder, x: Any, slope: float = 0.01) -> Expr:
    v = b.x(x)
    positive = b.call("gt", v, b.number(0), dtype="bool")
    return b.call("select", positive, v, b.call("mul", v, b.number(slope)))


@rule("elu")
def _elu(b: Builder, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Expr:
    v = b.x(x)
    curve = b.call("expm1", b.call("mul", v, b.number(input_scale)))
    negative = b.call("mul", curve, b.number(alpha * scale))
    positive = b.call("mul", v, b.number(scale))
    return b.call("select", b.call("gt", v, b.number(0), dtype="bool"), positive, negative)


@rule("softplus")
def _softplus(b: Builder, x: Any, beta: float = 1, threshold: float = 20) -> Expr:
    v = b.x(x)
    scaled = b.call("mul", v, b.number(beta))
    curve = b.call("div", b.call("log1p", b.call("exp", scaled)), b.number(beta))
    return b.call("select", b.call("gt", scaled, b.number(threshold), dtype="bool"), v, curve)


@rule("log_sigmoid_forward", "log_sigmoid")
def _log_sigmoid(b: Builder, x: Any) -> Expr:
    v = b.x(x)
    tail = b.call("log1p", b.call("exp", b.call("neg", b.call("abs", v))))
    return b.call("sub", b.call("min", v, b.number(0)), tail)


@rule("hardsigmoid", "hardswish")
def _hardsigmoid(b: Builder, x: Any) -> Expr:
    v = b.x(x)
    shifted = b.call("max", b.call("add", v, b.number(3)), b.number(0))
    gate = b.call("min", shifted, b.number(6))
    gate = b.call("mul", v, gate) if op_name(b.node) == "aten::hardswish" else gate
    return b.call("div", gate, b.number(6))


@rule("mish")
def _mish(b: Builder, x: Any) -> Expr:
    return b.call("mul", b.x(x), b.call("tanh", _softplus(b, x)))


@rule("gelu")
def _gelu(b: Builder, x: Any, *, approximate: str = "none") -> Expr:
    return b.call("gelu" if approximate == "none" else "gelu_tanh", b.x(x))


@rule("aios::gated_activation")
def _gated_activation(b: Builder, gate: Any, up: Any, activation: str) -> Expr:
    act = cast(b.call(activation, b.x(gate)), b.out)  # eager rounds between the two
    return b.call("mul", cast(act, b.dtype), b.x(up))


@rule("addcmul", "addcdiv")
def _addc(b: Builder, x: Any, y: Any, z: Any, *, value: float = 1) -> Expr:
    op = "mul" if op_name(b.node) == "aten::addcmul" else "div"
    product = b.call(op, b.x(y), b.x(z))
    product = product if value == 1 else b.call("mul", product, b.number(value))
    return b.call("add", b.x(x), product)


@rule("lerp")
def _lerp(b: Builder, x: Any, y: Any, weight: Any) -> Expr:
    return b.call("add", b.x(x), b.call("mul", b.x(weight), b.call("sub", b.x(y), b.x(x))))


@rule("scalar_tensor", "full_like", "full", "new_full")
def _full(b: Builder, *args: Any, **_: Any) -> Expr:
    name = op_name(b.node)
    index = {"aten::scalar_tensor": 0, "aten::full_like": 1, "aten::full": 1, "aten::new_full": 2}
    return b.x(args[index[name]])


@rule("zeros_like", "zeros", "new_zeros", "empty_like", "empty")
def _zeros(b: Builder, *_args: Any, **_: Any) -> Expr:
    return b.number(0)


@rule("ones_like", "ones", "new_ones")
def _ones(b: Builder, *_args: Any, **_: Any) -> Expr:
    return b.number(1)


def is_movement(expr: Expr) -> bool:
    """Return whether the expression computes nothing: a load, a number or a cast of one."""
    return not isinstance(expr, Call) or (expr.op == "cast" and is_movement(expr.args[0]))
