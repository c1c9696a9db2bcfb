"""A norm before a linear: in the product's own loop for few tokens, rows of its own for many.

sum over k of w[n, k] * (x[k] * r * g[k]) = r * (sum over k of w[n, k] * (x[k] * g[k])), r = 1 /
rms(x): a program that goes through all of k for its columns adds the squares of x as they pass and
multiplies its sums by r at the end. Bytes: g once a program, from L2; no pass over x, no launch.
With many tokens a program of one row a token writes the normalised rows to the workspace instead:
each tile of columns would scale x again.
"""

from __future__ import annotations

from dataclasses import replace

from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.strided import Strided
from aios_compile.codegen.triton.frame import Launch, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import kernel_text, space_of, tail_lines, x_row


def gain_lines(spec: LinearSpec, place: str, mask: str = "") -> list[str]:
    """Return the line that loads `gain`, the norm's weight at `place`; none without a weight."""
    if spec.norm is None or spec.norm.weight is None:
        return []
    weight = spec.norm.weight
    offset = "" if weight.offset == 0 else f"{python_dim(weight.offset)} + "
    at = f"{variable(weight.operand, weight.index)} + {offset}{place}"
    return [f"gain = tl.load({at}{mask}).to(tl.float32)"]


def scaled(spec: LinearSpec, text: str) -> str:
    """Return the text of a value of x times the norm's weight."""
    weighted = spec.norm is not None and spec.norm.weight is not None
    return f"{text} * gain" if weighted else text


def scale_text(spec: LinearSpec, squares: str) -> str:
    """Return 1 / rms of rows whose squares have the given sum."""
    assert spec.norm is not None
    return f"1.0 / tl.sqrt({squares} / {spec.depth} + {spec.norm.eps!r})"


def finish_lines(spec: LinearSpec) -> list[str]:
    """Return the lines from the sums (and `total`, the squares of x) to the outputs."""
    if spec.norm is None:
        return tail_lines(spec)
    scale = f"scale = {scale_text(spec, 'total')}"
    return [scale, *(f"sum{s} *= scale" for s in range(spec.streams)), *tail_lines(spec)]


def normed_operand(spec: LinearSpec) -> Operand:
    """Return the buffer of the normalised rows: [T, K]."""
    return Operand("normed", "f32", (spec.x.operand.shape[0], spec.depth), (spec.depth, 1))


def after_norm(spec: LinearSpec, operands: list[Operand]) -> LinearSpec:
    """Return the linear of the rows that `rows_kernel` has written."""
    index = space_of(operands, "normed")
    return replace(spec, x=Strided(index, operands[index], 0), norm=None)


def rows_kernel(spec: LinearSpec, operands: list[Operand], name: str) -> tuple[str, Launch]:
    """Return the kernel that writes normalised rows, and its launch: one program a token."""
    block = 1 << (spec.depth - 1).bit_length()
    index = space_of(operands, "normed")
    out = variable(operands[index], index)
    mask = "" if block == spec.depth else f", mask=k < {spec.depth}, other=0.0"
    stored = mask.partition(", other")[0]
    lines = [
        "token = tl.program_id(0).to(tl.int64)",
        "k = tl.arange(0, BLOCK)",
        f"x = tl.load({x_row(spec, 'token')} + k{mask})",
        f"scale = {scale_text(spec, 'tl.sum(x * x, 0)')}",
        *gain_lines(spec, "k", mask),
        f"tl.store({out} + token * {spec.depth} + k, {scaled(spec, 'x * scale')}{stored})",
    ]
    text = kernel_text(name, operands, ("BLOCK",), lines)
    rows = python_dim(spec.x.operand.shape[0])
    return text, Launch(name, rows, (("BLOCK", block),), 4 if block <= 4096 else 8, 1)
