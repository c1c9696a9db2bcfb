"""How a kernel sees a tensor: dtype, sizes, strides; each a number or a polynomial in T, S, R.

Torch-free once built: `of_value` reads a FakeTensor by duck typing only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aios_compile.errors import CodegenError

DTYPE_NAMES = {
    "torch.float32": "f32",
    "torch.bfloat16": "bf16",
    "torch.float16": "f16",
    "torch.float64": "f64",
    "torch.int64": "i64",
    "torch.int32": "i32",
    "torch.int16": "i16",
    "torch.int8": "i8",
    "torch.uint8": "u8",
    "torch.float8_e4m3fn": "e4m3",
    "torch.bool": "bool",
}
BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2}
BYTES.update({"i8": 1, "u8": 1, "e4m3": 1, "bool": 1})


@dataclass(frozen=True)
class SizeExpr:
    """A polynomial in the runtime sizes. terms: ((factors, coefficient), ...), e.g. 8*T*T + 3."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def text(self, prefix: str = "n->") -> str:
        """Return C text, e.g. `(8*n->T + 3)`; 64-bit because the sizes are int64_t."""
        parts = [
            "*".join([*([f"INT64_C({c})"] if c != 1 or not f else []), *(prefix + x for x in f)])
            for f, c in self.terms
        ]
        return "(" + " + ".join(parts) + ")"

    def value(self, sizes: Mapping[str, int]) -> int:
        total = 0
        for factors, coefficient in self.terms:
            for name in factors:
                coefficient *= sizes[name]
            total += coefficient
        return total


Dim = int | SizeExpr


def dim_text(dim: Dim, prefix: str = "n->") -> str:
    """Return a dimension as C text."""
    return f"INT64_C({dim})" if isinstance(dim, int) else dim.text(prefix)


def dim_value(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return a dimension as a number for the given runtime sizes."""
    return dim if isinstance(dim, int) else dim.value(sizes)


def dim_of(size: Any) -> Dim:
    """Turn an int or a SymInt (affine or polynomial in named sizes) into a Dim.

    Raises CodegenError for a size that is no polynomial with integer coefficients, ValueError for a
    symbol without a name.
    """
    if isinstance(size, int):
        return size
    node = size.node
    names: dict[str, str] = getattr(node.shape_env, "aios_size_names", {})
    expr = node.expr
    if expr.is_Integer:
        return int(expr)
    if not expr.is_polynomial(*expr.free_symbols):
        raise CodegenError(f"size {expr} is not a polynomial in the token and sequence counts")
    poly = expr.as_poly(*sorted(expr.free_symbols, key=str))
    terms = []
    for powers, coefficient in poly.terms():
        factors: list[str] = []
        for symbol, power in zip(poly.gens, powers):
            if str(symbol) not in names:
                raise ValueError(f"size symbol {symbol} has no name (known: {sorted(names)})")
            factors += [names[str(symbol)]] * power
        terms.append((tuple(sorted(factors)), int(coefficient)))
    return SizeExpr(tuple(sorted(terms, key=lambda t: (-len(t[0]), t[0]))))


@dataclass(frozen=True)
class Operand:
    """One kernel operand. Strides count elements. `packed` names a weight layout, e.g. "rows16"."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    packed: str | None = None

    @staticmethod
    def of_value(name: str, value: Any, packed: str | None = None) -> Operand:
        """Describe a FakeTensor or a real tensor (its storage offset is the caller's business)."""
        return Operand(
            name,
            DTYPE_NAMES[str(value.dtype)],
            tuple(dim_of(s) for s in value.shape),
            tuple(dim_of(s) for s in value.stride()),
            packed,
        )

    def squeezed(self) -> Operand:
        """Return the operand without its dimensions of size 1."""
        kept = [i for i, s in enumerate(self.shape) if s != 1]
        return Operand(
            self.name,
            self.dtype,
            tuple(self.shape[i] for i in kept),
            tuple(self.strides[i] for i in kept),
            self.packed,
        )

    def is_contiguous(self) -> bool:
        """Return whether the operand is dense in row-major order (size-1 dimensions ignored)."""
        expected: Dim = 1
        op = self.squeezed()
        for size, stride in zip(reversed(op.shape), reversed(op.strides)):
            if stride != expected:
                return False
            expected = multiply(expected, size)
        return True


def multiply(a: Dim, b: Dim) -> Dim:
    """Return the product of two dims."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    left = a.terms if isinstance(a, SizeExpr) else (((), a),)
    right = b.terms if isinstance(b, SizeExpr) else (((), b),)
    total: dict[tuple[str, ...], int] = {}
    for f, c in left:
        for g, d in right:
            key = tuple(sorted(f + g))
            total[key] = total.get(key, 0) + c * d
    return SizeExpr(tuple(sorted(total.items(), key=lambda t: (-len(t[0]), t[0]))))
