"""Parts of the text of the linear kernels: loads, products, the tail, the sums of a split depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.access import varies
from aios_compile.codegen.expression import Printer
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.triton.dialect import Texts, Triton
from aios_compile.codegen.triton.frame import python_dim, signature
from aios_compile.codegen.triton.linear_spec import LinearSpec

PRODUCT = """\
@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    # The interpreter has no bfloat16 arithmetic: there the factors are widened, which is exact.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)"""


@dataclass
class Tail(Texts):
    """Texts over the coordinates i0 (token) and i1 (column), with the masks mask0 and mask1."""

    def _load(self, index: int) -> str:
        leaf = self.leaves[index]
        assert not hasattr(leaf, "kind"), "a linear's tail has no reductions"
        if leaf.operand >= len(self.operands):
            return self.names[leaf.operand]
        operand = self.operands[leaf.operand]
        masks = self._masks(leaf.address)
        mask = f", mask={masks}, other=0" if masks else ""
        pointer = variable(operand, leaf.operand)
        text = f"tl.load({pointer} + {self.address(leaf.address)}{mask})"
        return f"{text}.to(tl.float32)" if operand.dtype in ("bf16", "f16") else text

    def store(self, operand: int, address: Linear, value: str) -> str:
        masks = self._masks(address)
        mask = f", mask={masks}" if masks else ""
        place = f"{variable(self.operands[operand], operand)} + {self.address(address)}"
        return f"tl.store({place}, {value}{mask})"

    def _masks(self, address: Linear) -> str:
        found = [f"mask{d}" for d in (0, 1) if varies(address.expr(), self.leaves, d)]
        return " & ".join(found)


def tail_lines(spec: LinearSpec) -> list[str]:
    """Return the lines from sum0, sum1, i0, i1, mask0, mask1 to the stores of the outputs."""
    count = len(spec.operands)
    names = {count + s: f"sum{s}" for s in range(spec.streams)}
    texts = Tail(spec.operands, spec.leaves, 1, names)
    lines, results = Printer(Triton()).statements(spec.values, texts.loads(spec.values))
    stores = zip(spec.outputs(), spec.stores, results)
    return lines + [texts.store(index, address, result) for index, address, result in stores]


def x_row(spec: LinearSpec, token: str) -> str:
    """Return the address of a token's first element."""
    x = spec.x
    offset = "" if x.offset == 0 else f" + {python_dim(x.offset)}"
    return f"{variable(x.operand, x.index)}{offset} + {token} * {python_dim(x.operand.strides[0])}"


def tile_lines(
    spec: LinearSpec, begin: Sequence[str] = ("item = tl.program_id(0).to(tl.int64)",)
) -> list[str]:
    """Return the lines that set i0 [1, BLOCK_T], i1 [BLOCK_N, 1], their masks, and token: a program
    has one tile, those of BLOCK_T tokens side by side. begin: what sets `item`, the tile.
    """
    rows = python_dim(spec.x.operand.shape[0])
    return [
        *begin,
        f"across = ({spec.columns} + BLOCK_N - 1) // BLOCK_N",
        "i0 = (item // across * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]",
        "i1 = (item % across * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]",
        f"mask0 = i0 < {rows}",
        f"mask1 = i1 < {spec.columns}",
        f"token = tl.minimum(i0, {rows} - 1)",
    ]


def w_row(spec: LinearSpec, column: str, stream: int) -> str:
    """Return the address of the first weight of a stream's column."""
    w = spec.weight
    stride = w.operand.strides[0]
    first = w.offset
    assert isinstance(stride, int) and isinstance(first, int), "weights have a fixed layout"
    first += stream * spec.columns * stride
    offset = "" if first == 0 else f" + {first}"
    return f"{variable(w.operand, w.index)}{offset} + {column} * {stride}"


def parts_of(spec: LinearSpec) -> tuple[str, list[str], str]:
    """Return the factors of a linear's product."""
    return factors(spec.x.operand.dtype, spec.weight.operand.dtype)


def factors(x: str, w: str) -> tuple[str, list[str], str]:
    """Return (type of the factors, lines that split x into parts, precision of a product).

    f32 x and bf16 w: two bf16 parts; f32 x and f16 w: two tf32 parts, in which f16 is exact.
    """
    if x == w:
        return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[x], ["x0 = x"], "ieee"
    if w == "bf16" and x == "f32":
        return "bfloat16", two_parts("x", "x0", "x1"), "ieee"
    if w == "f32":
        return "float32", ["x0 = x.to(tl.float32)"], "ieee"
    if x != "f32":  # bf16 and f16: each is exact in tf32
        return "float32", ["x0 = x.to(tl.float32)"], "tf32"
    lines = ["bits = x.to(tl.int32, bitcast=True) & -8192"]
    lines += ["x0 = bits.to(tl.float32, bitcast=True)", "x1 = x - x0"]
    return "float32", lines, "tf32"


def two_parts(value: str, first: str, second: str) -> list[str]:
    """Return the lines that split a float32 into two bf16, rounded to nearest.

    The first is rounded on its bits: what `.to(tl.bfloat16)` becomes where both the number and its
    float32 are used is F2F, of which a multiprocessor of Hopper does 16 a clock.
    """
    bits = f"({value}.to(tl.int32, bitcast=True) + 32768) & -65536"
    return [
        f"nearest = ({bits}).to(tl.float32, bitcast=True)",
        f"{first} = nearest.to(tl.bfloat16)",
        f"{second} = ({value} - nearest).to(tl.bfloat16)",
    ]


def space_of(operands: Sequence[Operand], name: str) -> int:
    """Return the index of a workspace buffer; it stands behind the kernel's own operands."""
    return max(i for i, operand in enumerate(operands) if operand.name == name)


def kernel_text(
    name: str, operands: list[Operand], constexprs: tuple[str, ...], body: list[str]
) -> str:
    """Return a kernel function."""
    return "\n".join([*signature(name, operands, constexprs), *(f"    {line}" for line in body)])
