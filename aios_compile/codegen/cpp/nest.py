"""Write one loop nest: outer coordinates are known, the innermost runs over lanes or elements.

Shared by the pointwise and the row-reduction emitter. What does not change along the innermost
dimension is computed before the loop by the scalar dialect, whose results are those of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aios_compile.codegen.access import Access, Leaf, varies
from aios_compile.codegen.cpp.dialect import VECTORS, Cpp, scalar_type, vectorizable
from aios_compile.codegen.expression import (
    Const,
    Expr,
    Load,
    Printer,
    substitute,
    walk,
)
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Operand


@dataclass
class Nest:
    """`names[i]` is the text of leaf i where it is no Access (a reduced value)."""

    operands: Sequence[Operand]
    leaves: Sequence[Leaf]
    rank: int
    names: dict[int, str] = field(default_factory=dict)

    @property
    def inner(self) -> int:
        return self.rank - 1

    def scalar(self) -> Printer:
        return Printer(Cpp(False, tuple(f"i{d}" for d in range(self.rank))))

    def address(self, linear: Linear) -> str:
        """Return the text of an address; loads inside it are read one element at a time."""
        return self.scalar().text(linear.expr(), self.scalar_loads([linear.expr()]))

    def scalar_loads(self, exprs: Sequence[Expr]) -> list[str]:
        """Return texts that read one element of each leaf that the expressions use."""
        texts = [""] * len(self.leaves)
        for expr in exprs:
            for e in walk(expr):
                if isinstance(e, Load) and e.index < len(self.leaves) and not texts[e.index]:
                    texts[e.index] = self._scalar_load(e.index)
        return texts

    def _scalar_load(self, index: int) -> str:
        leaf = self.leaves[index]
        if not isinstance(leaf, Access):
            return self.names[index]
        operand = self.operands[leaf.operand]
        return f"load1({variable(operand, leaf.operand)} + {_wrap(self.address(leaf.address))})"

    def varies(self, expr: Expr) -> bool:
        return varies(expr, self.leaves, self.inner)

    def can_vectorize(self, exprs: Sequence[Expr], stores: Sequence[tuple[int, Linear]]) -> bool:
        """Return whether the innermost dimension can run in vectors."""
        loads = {e.index for x in exprs for e in walk(x) if isinstance(e, Load)}
        linears = [a for i in loads if isinstance(a := self.leaves[i], Access)]
        addresses = [a.address for a in linears] + [address for _, address in stores]
        steady = all(
            address.coefficient(self.inner) == 0 or not self._moves(address)
            for address in addresses
        ) and not any(self._moves(address) for address in addresses)
        types = all(self.operands[o].dtype in VECTORS for o, _ in stores)
        return steady and types and vectorizable(self.hoisted(exprs)[1])

    def _moves(self, address: Linear) -> bool:
        """Return whether an address changes along the innermost dimension in a way of its own."""
        return any(self.varies(atom) for atom in address.without(self.inner).atoms())

    def hoisted(self, exprs: Sequence[Expr]) -> tuple[list[Expr], list[Expr]]:
        """Return (what stays the same in the inner loop, expressions over Loads of them).

        The k-th part is Load(len(leaves) + k) in the rewritten expressions.
        """
        parts: dict[Expr, Load] = {}

        def change(e: Expr) -> Expr | None:
            if isinstance(e, Const) or self.varies(e):
                return None
            if e not in parts:
                parts[e] = Load(len(self.leaves) + len(parts), e.dtype)
            return parts[e]

        rewritten = [substitute(e, change) for e in exprs]
        return list(parts), rewritten

    def vector_parts(self, exprs: Sequence[Expr]) -> tuple[list[str], list[str], list[Expr]]:
        """Return (lines before the loop, texts of all loads in it, expressions to print in it)."""
        parts, rewritten = self.hoisted(exprs)
        lines, results = self.scalar().statements(parts, self.scalar_loads(parts), "s")
        texts = [""] * len(self.leaves)
        for index in sorted({e.index for x in rewritten for e in walk(x) if isinstance(e, Load)}):
            leaf = self.leaves[index] if index < len(self.leaves) else None
            if isinstance(leaf, Access):
                line, texts[index] = self._vector_load(index, leaf)
                lines.append(line)
        for k, (part, text) in enumerate(zip(parts, results)):
            lines.append(f"const {VECTORS.get(part.dtype, 'auto')} u{k} = splat({text});")
            texts.append(f"u{k}")
        return lines, texts, rewritten

    def _vector_load(self, index: int, leaf: Access) -> tuple[str, str]:
        operand = self.operands[leaf.operand]
        base = self.address(leaf.address.without(self.inner))
        stride = Linear((), leaf.address.coefficient(self.inner))
        line = f"const auto* a{index} = {variable(operand, leaf.operand)} + {_wrap(base)};"
        if stride.constant == 1:
            return line, f"load(a{index} + i{self.inner}, count)"
        step = self.address(stride)
        return line, f"load_strided(a{index} + i{self.inner} * {step}, {step}, count)"

    def store(self, operand_index: int, address: Linear, value: str, vector: bool) -> str:
        """Return the statement that stores `value`."""
        name = variable(self.operands[operand_index], operand_index)
        place = f"{name} + {_wrap(self.address(address))}"
        if not vector:
            return f"store1({place}, {value});"
        stride = Linear((), address.coefficient(self.inner))
        if stride.constant == 1:
            return f"store({place}, {value}, count);"
        return f"store_strided({place}, {self.address(stride)}, {value}, count);"

    def declare(self, dtype: str, name: str, text: str, vector: bool) -> str:
        kind = VECTORS[dtype] if vector else scalar_type(dtype)
        return f"const {kind} {name} = {text};"


def _wrap(text: str) -> str:
    return f"({text})" if " " in text and not text.startswith("(") else text
