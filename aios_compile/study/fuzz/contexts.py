"""The kinds of context that a pattern is planted in: where its inputs come from, who uses it."""

from __future__ import annotations

from collections.abc import Callable

from aios_compile.study.fuzz.builder import Builder, Planted
from aios_compile.study.fuzz.program import Parameter, Rejected, Shape

Source = Callable[[Builder, Parameter], str]
Use = Callable[[Builder, Planted], None]
FLOATS = ("f32", "bf16", "f16")
SOURCES: dict[str, Source] = {}
USES: dict[str, Use] = {}


def source(function: Source) -> Source:
    """Register a way to make an input of a pattern."""
    SOURCES[function.__name__] = function
    return function


def use(function: Use) -> Use:
    """Register a way to use what a pattern returns."""
    USES[function.__name__] = function
    return function


def _fresh(b: Builder, p: Parameter, shape: Shape | None = None, dtype: str = "") -> str:
    return b.parameter(shape or p.shape, dtype or p.dtype, below=p.below, scale=p.scale)


def _last(p: Parameter) -> int:
    size = p.shape[-1]
    if not isinstance(size, int):
        raise Rejected("the last dimension is the tokens")
    return size


def _float(p: Parameter) -> None:
    if p.dtype not in FLOATS:
        raise Rejected("an input of whole numbers")


def _rank(p: Parameter) -> None:
    if len(p.shape) < 2:
        raise Rejected("an input of one dimension")


@source
def an_input(b: Builder, p: Parameter) -> str:
    return _fresh(b, p)


@source
def under_a_transpose(b: Builder, p: Parameter) -> str:
    _rank(p)
    turned = (*p.shape[:-2], p.shape[-1], p.shape[-2])
    return b.add(f"torch.transpose({_fresh(b, p, turned)}, -1, -2)")


@source
def every_second_column(b: Builder, p: Parameter) -> str:
    wide = _fresh(b, p, (*p.shape[:-1], 2 * _last(p)))
    return b.add(f"aten.slice.Tensor({wide}, {len(p.shape) - 1}, 0, {2 * _last(p)}, 2)")


@source
def part_of_a_wider_row(b: Builder, p: Parameter) -> str:
    wide = _fresh(b, p, (*p.shape[:-1], _last(p) + 5))
    return b.add(f"torch.narrow({wide}, -1, {b.rng.choice([0, 3, 5])}, {_last(p)})")


@source
def one_of_a_stack(b: Builder, p: Parameter) -> str:
    stack = _fresh(b, p, (3, *p.shape))
    return b.add(f"torch.select({stack}, 0, {b.rng.choice([0, 1, 2])})")


@source
def reshaped(b: Builder, p: Parameter) -> str:
    if p.shape[0] != "T" or len(p.shape) != 3:
        raise Rejected("not a value of heads")
    flat = _fresh(b, p, ("T", int(p.shape[1]) * int(p.shape[2])))
    return b.add(f"torch.reshape({flat}, [-1, {p.shape[1]}, {p.shape[2]}])")


@source
def behind_a_cast(b: Builder, p: Parameter) -> str:
    _float(p)
    other = "bf16" if p.dtype == "f32" else "f32"
    name = {"f32": "torch.float32", "bf16": "torch.bfloat16", "f16": "torch.float16"}[p.dtype]
    return b.add(f"aten._to_copy.default({_fresh(b, p, dtype=other)}, dtype={name})")


@source
def a_sum(b: Builder, p: Parameter) -> str:
    _float(p)
    return b.add(f"torch.add({_fresh(b, p)}, {_fresh(b, p)})")


@source
def broadcast(b: Builder, p: Parameter) -> str:
    _float(p)
    _rank(p)
    column = _fresh(b, p, (*p.shape[:-1], 1))
    row = _fresh(b, p, (_last(p),))
    return b.add(f"torch.mul({column}, {row})")


@source
def expanded(b: Builder, p: Parameter) -> str:
    """Give a value all of whose columns are one column in memory."""
    _rank(p)
    sizes = ", ".join("-1" for _ in p.shape[:-1])
    column = _fresh(b, p, (*p.shape[:-1], 1))
    return b.add(f"aten.expand.default({column}, [{sizes}, {_last(p)}])")


@source
def behind_folded_constants(b: Builder, p: Parameter) -> str:
    _float(p)
    w = b.parameter((_last(p),), p.dtype, "weight", scale=0.5)
    scaled = b.add(f"torch.mul({_fresh(b, p)}, torch.add(torch.mul({w}, {w}), 0.5))")
    return b.add(f"torch.add(torch.mul({scaled}, 1.0), 0.0)")


@source
def two_halves(b: Builder, p: Parameter) -> str:
    width = _last(p)
    if width < 2:
        raise Rejected("nothing to cut")
    first = _fresh(b, p, (*p.shape[:-1], width // 2))
    second = _fresh(b, p, (*p.shape[:-1], width - width // 2))
    return b.add(f"torch.cat([{first}, {second}], -1)")


@source
def an_earlier_value(b: Builder, p: Parameter) -> str:
    """Take what another pattern or statement left, if its shape fits."""
    fits = [n for n in b.tensors(p.dtype) if b.shape(n) == p.shape]
    if not fits or p.dtype not in FLOATS:
        raise Rejected("no value fits")
    return b.rng.choice(fits[-4:])


@source
def of_a_linear(b: Builder, p: Parameter) -> str:
    _float(p)
    _rank(p)
    w = b.weight(_last(p), 16, dtype=p.dtype)
    return b.add(f"F.linear({_fresh(b, p, (*p.shape[:-1], 16))}, {w})")


@source
def extreme(b: Builder, p: Parameter) -> str:
    _float(p)
    scale = b.rng.choice([-1.0, 1e-4, 1e-20, 30.0, 300.0, -300.0, 0.0])
    return b.parameter(p.shape, p.dtype, scale=scale)


@source
def normalised(b: Builder, p: Parameter) -> str:
    _float(p)
    x = _fresh(b, p)
    return b.add(f"torch.softmax({x}, -1)" if p.dtype == "f32" else f"torch.tanh({x})")


# What becomes of the results. b.results are given out; a use adds to them.


@use
def given_out(b: Builder, planted: Planted) -> None:
    b.results += planted.results


@use
def inner_value_escapes(b: Builder, planted: Planted) -> None:
    floats = [n for n in planted.inner if n in b.tensors()]
    if not floats:
        raise Rejected("nothing between")
    b.results += [*planted.results, b.rng.choice(floats)]


@use
def inner_value_has_another_user(b: Builder, planted: Planted) -> None:
    floats = [n for n in planted.inner if n in b.tensors()]
    if not floats:
        raise Rejected("nothing between")
    b.results += [*planted.results, b.add(f"torch.sin({b.rng.choice(floats)})")]


@use
def given_out_and_used(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    b.results += [x, b.add(f"torch.abs(torch.sub({x}, 0.5))")]


@use
def given_out_twice(b: Builder, planted: Planted) -> None:
    b.results += [*planted.results, planted.results[0]]


@use
def two_users(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    b.results += [b.add(f"torch.tanh({x})"), b.add(f"torch.mul({x}, -0.5)")]


@use
def part_of_it(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    width = b.shape(x)[-1]
    if not isinstance(width, int) or width < 2:
        raise Rejected("nothing to cut")
    b.results.append(b.add(f"torch.narrow({x}, -1, {width // 2}, {width - width // 2})"))


@use
def cast_and_back(b: Builder, planted: Planted) -> None:
    half = b.add(f"aten._to_copy.default({planted.results[0]}, dtype=torch.float16)")
    b.results.append(b.add(f"torch.add(aten._to_copy.default({half}, dtype=torch.float32), 1.0)"))


@use
def reduced(b: Builder, planted: Planted) -> None:
    b.results.append(b.add(f"torch.amax({planted.results[0]}, -1)"))


@use
def transposed(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    if len(b.shape(x)) < 2:
        raise Rejected("one dimension")
    b.results.append(b.add(f"torch.transpose(torch.relu({x}), 0, 1)"))


@use
def into_a_linear(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    width = b.shape(x)[-1]
    if not isinstance(width, int):
        raise Rejected("the last dimension is the tokens")
    b.results.append(b.add(f"F.linear({x}, {b.weight(24, width, dtype=b.dtype(x))})"))


@use
def joined_with_itself(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    b.results.append(b.add(f"torch.cat([{x}, torch.neg({x})], -1)"))


@use
def normed(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    width = b.shape(x)[-1]
    if not isinstance(width, int):
        raise Rejected("the last dimension is the tokens")
    b.results.append(b.add(f"F.layer_norm({x}, [{width}])"))


@use
def masked(b: Builder, planted: Planted) -> None:
    x = planted.results[0]
    b.results.append(b.add(f"torch.where(torch.gt({x}, 0.0), {x}, torch.mul({x}, 0.1))"))
