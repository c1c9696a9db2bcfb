"""What the matchers of all passes share: symbolic shapes as text, scalars, casts, operands.

Nothing here changes a graph. Sizes are compared as text because comparing symbolic sizes as numbers
would add a guard.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.ir import ops
from aios_compile.passes.context import PassContext

aten = torch.ops.aten

HALF = (torch.bfloat16, torch.float16)
END = 2**63 - 1  # what ATen writes for "to the end"
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)

Size = int | str

assert ops.TABLE, "the op table must be registered before a pass names an op"


def is_call(value: Any, *targets: Any) -> bool:
    """Return whether a value is a node that calls one of the targets."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def value_of(node: Any) -> Tensor | None:
    """Return the fake tensor of a node, or None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def size_text(size: Any) -> Size:
    """Return an int as it is and a symbolic size as the text of its expression."""
    return size if isinstance(size, int) else str(size.node.expr)


def shape_of(node: Any) -> tuple[Size, ...]:
    """Return the shape of a tensor node, hashable and free of guards; () for anything else."""
    value = value_of(node)
    return () if value is None else tuple(size_text(s) for s in value.shape)


def dtype_of(node: Any) -> torch.dtype | None:
    value = value_of(node)
    return None if value is None else value.dtype


def rank_of(node: Any) -> int:
    return len(shape_of(node))


def positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def is_last(dims: Any, rank: int) -> bool:
    """Return whether a reduction's dims argument is exactly the last dimension."""
    return [positive(d, rank) for d in (dims if isinstance(dims, Sequence) else [dims])] == [
        rank - 1
    ]


def shape_argument(value: Tensor) -> list[int] | None:
    """Return a shape as a view's argument, the one symbolic size as -1; None if there are two."""
    sizes = [s if isinstance(s, int) else -1 for s in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def is_float_cast(node: Any) -> bool:
    """Return whether a node changes nothing but one floating-point dtype to another."""
    if not is_call(node, aten._to_copy.default):
        return False
    before, after = dtype_of(node.args[0]), dtype_of(node)
    if (
        before is None
        or after is None
        or {k for k, v in node.kwargs.items() if v is not None} != {"dtype"}
    ):
        return False
    return before.is_floating_point and after.is_floating_point


def without_casts(node: Any) -> Any:
    """Return what stands behind floating-point casts."""
    while is_float_cast(node):
        node = node.args[0]
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the single user of a node (the output counts as one)."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def scalar(value: Any, context: PassContext) -> float | None:
    """Return a number that is known while compiling: a literal, a filled scalar, a 0-d constant."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    value = without_casts(value)
    if is_call(value, aten.full.default) and list(value.args[0]) == []:
        return scalar(value.args[1], context)
    if is_call(value, aten.scalar_tensor.default):
        return scalar(value.args[0], context)
    if isinstance(value, fx.Node) and shape_of(value) == () and value_of(value) is not None:
        return _known(value, context)
    return None


def _known(node: fx.Node, context: PassContext) -> float | None:
    """Return the value of a 0-d weight whose tensor is known and the same in every call."""
    if not context.is_weight(node):
        return None
    recipes = context.recipes(node)
    tensors = context.module.tensors
    if not all(name in tensors for recipe in recipes for name in recipe.names):
        return None
    numbers = {float(recipe.run(tensors)) for recipe in recipes}
    return numbers.pop() if len(numbers) == 1 else None


def product(node: Any) -> tuple[Any, Any] | None:
    """Return the operands of a product of two tensors."""
    if is_call(node, aten.mul.Tensor) and all(isinstance(a, fx.Node) for a in node.args):
        return node.args[0], node.args[1]
    return None


def total(node: Any) -> tuple[Any, Any] | None:
    """Return the operands of a + b without a factor."""
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and not node.kwargs:
        return node.args[0], node.args[1]
    return None


def scaled(node: Any, context: PassContext) -> tuple[fx.Node, float] | None:
    """Return (x, c) of x * c, c * x or x / c with a known number c."""
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for x, other in (node.args[:2], node.args[1::-1]):
            c = scalar(other, context)
            if c is not None and isinstance(x, fx.Node) and shape_of(x) == shape_of(node):
                return x, c
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and not node.kwargs:
        c = scalar(node.args[1], context)
        if c and isinstance(node.args[0], fx.Node):
            return node.args[0], 1.0 / c
    return None


class Part(NamedTuple):
    """source[..., start:stop:step] along the last dimension."""

    source: fx.Node
    start: int
    stop: int
    step: int = 1


def part(node: Any) -> Part | None:
    """Read a slice, or one piece of a split, along the last dimension of fixed width."""
    if is_call(node, aten.slice.Tensor):
        args = [*node.args, *(None, 0, END, 1)[len(node.args) - 1 :]][:5]
        source, dim, start, stop, step = args
        width = shape_of(source)[-1]
        if positive(dim or 0, rank_of(source)) != rank_of(source) - 1 or isinstance(width, str):
            return None
        first, last, stride = slice(start, stop, step).indices(width)
        return Part(source, first, last, stride)
    if is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS):
        split, index = node.args[0], int(node.args[1])
        dim = split.args[2] if len(split.args) > 2 else 0
        source = split.args[0]
        if positive(dim, rank_of(source)) != rank_of(source) - 1:
            return None
        widths = [value.shape[-1] for value in split.meta["val"]]
        start = sum(widths[:index])
        return Part(source, start, start + widths[index])
    return None


def mean_of_last(node: Any, context: PassContext) -> Any:
    """Return x of mean(x, -1, keepdim=True), also spelled sum(x) / width or taken from var_mean."""
    if is_call(node, aten.mean.dim) and _keeps_last(node):
        return node.args[0]
    if is_call(node, operator.getitem) and node.args[1] == 1:
        pair: Any = node.args[0]
        return pair.args[0] if is_call(pair, aten.var_mean.correction) else None
    quotient = scaled(node, context)
    if quotient is not None and is_call(quotient[0], aten.sum.dim_IntList):
        inner: Any = quotient[0]
        width = shape_of(inner.args[0])[-1]
        if _keeps_last(inner) and isinstance(width, int) and quotient[1] == 1.0 / width:
            return inner.args[0]
    return None


def _keeps_last(node: Any) -> bool:
    keepdim = len(node.args) > 2 and bool(node.args[2])
    return keepdim and is_last(node.args[1], rank_of(node.args[0]))


def centred_on_mean(node: Any, context: PassContext) -> Any:
    """Return x of x - mean(x) over the last dimension."""
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = node.args
    return x if mean_of_last(mean, context) is x else None


def squared(node: Any) -> Any:
    """Return x of x ** 2 or x * x."""
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    factors = product(node)
    return factors[0] if factors is not None and factors[0] is factors[1] else None


class Quotient(NamedTuple):
    """x / sqrt(variance + eps): the root node and its parts."""

    node: fx.Node
    x: fx.Node
    eps: float


def quotients(variance: fx.Node, context: PassContext) -> list[Quotient]:
    """Return every x / sqrt(variance + eps) that is computed, in whichever spelling."""
    found = []
    for node, eps in [(variance, 0.0), *_with_eps(variance, context)]:
        for user in list(node.users):
            if _is_reciprocal_root(user):
                found += [Quotient(u, x, eps) for u, x in _multiplied(user)]
            elif is_call(user, aten.sqrt.default) or _is_power(user, 0.5):
                for last in list(user.users):
                    if is_call(last, aten.reciprocal.default):
                        found += [Quotient(u, x, eps) for u, x in _multiplied(last)]
                    elif is_call(last, aten.div.Tensor) and last.args[1] is user:
                        numerator: Any = last.args[0]
                        if isinstance(numerator, fx.Node):
                            found.append(Quotient(last, numerator, eps))
                        elif numerator == 1:
                            found += [Quotient(u, x, eps) for u, x in _multiplied(last)]
    return found


def _with_eps(variance: fx.Node, context: PassContext) -> list[tuple[fx.Node, float]]:
    found = []
    for user in variance.users:
        operands = total(user)
        if operands is not None:
            other = operands[1] if operands[0] is variance else operands[0]
            eps = scalar(other, context)
            if eps is not None:
                found.append((user, eps))
    return found


def _is_power(node: Any, exponent: float) -> bool:
    return is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == exponent


def _is_reciprocal_root(node: Any) -> bool:
    return is_call(node, aten.rsqrt.default) or _is_power(node, -0.5)


def _multiplied(factor: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return (product, other factor) of every product with `factor`."""
    found = []
    for user in factor.users:
        factors = product(user)
        if factors is not None:
            found.append((user, factors[1] if factors[0] is factor else factors[0]))
    return found
