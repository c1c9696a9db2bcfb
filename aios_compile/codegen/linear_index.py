"""Index arithmetic in normal form: a sum of atoms times coefficients, plus a constant.

An atom is an Index (a coordinate of the iteration space) or an opaque int64 expression, such as a
loaded token id. Coefficients are Dims: numbers or polynomials in the runtime sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aios_compile.codegen.expression import Call, Const, Expr, Index, Size, call
from aios_compile.codegen.operand import Dim, SizeExpr, multiply


def add_dims(a: Dim, b: Dim) -> Dim:
    """Return the sum of two dims; an int when nothing symbolic is left."""
    total: dict[tuple[str, ...], int] = {}
    for dim in (a, b):
        for factors, c in dim.terms if isinstance(dim, SizeExpr) else (((), dim),):
            total[factors] = total.get(factors, 0) + c
    terms = {f: c for f, c in total.items() if c}
    if all(f == () for f in terms):
        return terms.get((), 0)
    return SizeExpr(tuple(sorted(terms.items(), key=lambda t: (-len(t[0]), t[0]))))


def scale(dim: Dim, by: Dim) -> Dim:
    """Return the product of two dims; an int when nothing symbolic is left."""
    return add_dims(multiply(dim, by), 0)


def product(dims: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = scale(total, dim)
    return total


@dataclass(frozen=True)
class Linear:
    """sum(coefficient * atom) + constant, int64."""

    terms: tuple[tuple[Expr, Dim], ...] = ()
    constant: Dim = 0

    @staticmethod
    def of(value: Linear | Expr | Dim) -> Linear:
        if isinstance(value, Linear):
            return value
        if isinstance(value, (int, SizeExpr)):
            return Linear((), value)
        if isinstance(value, Const):
            return Linear((), int(value.value))
        if isinstance(value, Size):
            return Linear((), value.dim)
        return Linear(((value, 1),))

    def plus(self, other: Linear | Expr | Dim) -> Linear:
        right = Linear.of(other)
        total = dict(self.terms)
        for atom, c in right.terms:
            total[atom] = add_dims(total.get(atom, 0), c)
        terms = sorted(((a, c) for a, c in total.items() if c != 0), key=lambda t: repr(t[0]))
        return Linear(tuple(terms), add_dims(self.constant, right.constant))

    def times(self, by: Dim) -> Linear:
        terms = tuple((a, scale(c, by)) for a, c in self.terms)
        return Linear(tuple(t for t in terms if t[1] != 0), scale(self.constant, by))

    def coefficient(self, dim: int) -> Dim:
        """Return the coefficient of Index(dim)."""
        return dict(self.terms).get(Index(dim), 0)

    def without(self, dim: int) -> Linear:
        return Linear(tuple(t for t in self.terms if t[0] != Index(dim)), self.constant)

    def is_affine(self) -> bool:
        """Return whether every atom is a coordinate."""
        return all(isinstance(a, Index) for a, _ in self.terms)

    def atoms(self) -> tuple[Expr, ...]:
        return tuple(a for a, _ in self.terms)

    def expr(self) -> Expr:
        """Return the sum as an int64 expression."""
        parts: list[Expr] = [
            a if c == 1 else call("mul", (a, _dim_expr(c)), "i64") for a, c in self.terms
        ]
        if self.constant != 0 or not parts:
            parts.append(_dim_expr(self.constant))
        total = parts[0]
        for part in parts[1:]:
            total = call("add", (total, part), "i64")
        return total

    def map(self, change: Callable[[Expr], Linear]) -> Linear:
        """Return the sum with each atom replaced."""
        total = Linear((), self.constant)
        for atom, c in self.terms:
            total = total.plus(change(atom).times(c))
        return total


def _dim_expr(dim: Dim) -> Expr:
    return Const(dim, "i64") if isinstance(dim, int) else Size(dim)


Limits = Mapping[int, int]


def divided(value: Linear, by: Dim, limits: Limits | None = None) -> Linear:
    """Return value // by for a value >= 0. `limits[d]` bounds Index(d) from above, exclusively."""
    if by == 1:
        return value
    parts = _parted(value, by, limits or {})
    if parts is not None and isinstance(by, int):
        whole, _ = parts
        terms = tuple((a, int(c) // by) for a, c in whole.terms)  # type: ignore[arg-type]
        return Linear(terms, int(whole.constant) // by)  # type: ignore[arg-type]
    return Linear.of(Call("trunc_divide", (value.expr(), _dim_expr(by)), "i64"))


def remainder(value: Linear, by: Dim, limits: Limits | None = None) -> Linear:
    """Return value % by for a value >= 0."""
    if by == 1:
        return Linear()
    parts = _parted(value, by, limits or {})
    if parts is not None:
        return parts[1]
    return Linear.of(Call("fmod", (value.expr(), _dim_expr(by)), "i64"))


def _parted(value: Linear, by: Dim, limits: Limits) -> tuple[Linear, Linear] | None:
    """Return (a multiple of `by`, a rest in [0, by)) whose sum is the value, or None."""
    numbers = [c for _, c in value.terms] + [value.constant]
    if not isinstance(by, int) or not all(isinstance(c, int) for c in numbers):
        return None
    constant = int(value.constant)  # type: ignore[arg-type]
    whole = [t for t in value.terms if t[1] % by == 0]  # type: ignore[operator]
    rest = [t for t in value.terms if t[1] % by != 0]  # type: ignore[operator]
    largest = constant % by
    for atom, c in rest:
        if not isinstance(atom, Index) or atom.dim not in limits or c < 0:  # type: ignore[operator]
            return None
        largest += c * (limits[atom.dim] - 1)  # type: ignore[operator]
    if largest >= by:
        return None
    return Linear(tuple(whole), constant - constant % by), Linear(tuple(rest), constant % by)
