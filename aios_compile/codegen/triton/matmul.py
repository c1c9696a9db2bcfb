"""out[b, m, n] = beta * bias + alpha * sum over k of left[b, m, k] * right[b, k, n].

The generic fallback, for matrix products that no pass turned into a linear or an attention; the
spec is the C++ emitter's. Layout: any strides, so transposed and expanded operands cost no copy;
f32, bf16 and f16, accumulated in float32; operands of two dtypes meet in float32. Grid: one program
a tile of 32 rows and 64 columns of one batch; 16 rows where there are no more. Order of the sum:
blocks of 32 in k, ascending.
"""

from __future__ import annotations

import re

from torch import Tensor

from aios_compile.codegen.access import Access
from aios_compile.codegen.cpp import matmul
from aios_compile.codegen.cpp.matmul import MatmulSpec
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.naming import layout, symbol_of, variable
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.dialect import Texts
from aios_compile.codegen.triton.frame import Launch, Variant, module_text, python_dim, signature
from aios_compile.codegen.triton.linear_text import PRODUCT

BLOCK_N, BLOCK_K = 64, 32
ROWS = ((16, 16), (None, 32))  # row bound, rows of a tile

spec_of = matmul.spec_of


def reference(spec: MatmulSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the output in torch from the spec alone."""
    return matmul.reference(spec, *tensors)


def emit(spec: MatmulSpec) -> KernelSource:
    """Return the kernel module."""
    symbol = symbol_of(spec.name, spec)
    constexprs = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    head = signature(symbol, spec.operands, constexprs)
    kernel = "\n".join([*head, *(f"    {line}" for line in _body(spec))])
    batch, m, n, _ = (python_dim(d) for d in spec.shape)
    variants = []
    for most, block in ROWS:
        grid = f"{batch} * (({m} + {block - 1}) // {block}) * (({n} + {BLOCK_N - 1}) // {BLOCK_N})"
        values = (("BLOCK_M", block), ("BLOCK_N", BLOCK_N), ("BLOCK_K", BLOCK_K))
        variants.append(Variant(most, (Launch(symbol, grid, values, 4, 3),)))
    comment = [f"{spec.name}: out[b, m, n] = sum over k of left[b, m, k] * right[b, k, n]"]
    comment += [f"  {layout(o)}" for o in spec.operands]
    comment += [f"model: {line}" for line in spec.model_lines]
    text = module_text(comment, spec.operands, [PRODUCT, kernel], variants, spec.shape[1])
    return KernelSource(spec.name, symbol, "triton", text, len(spec.operands), (), spec.model_lines)


def _body(spec: MatmulSpec) -> list[str]:
    _, m, n, depth = (python_dim(d) for d in spec.shape)
    dtypes = {spec.operands[a.operand].dtype for a in (spec.left, spec.right)}
    widen = "" if len(dtypes) == 1 else ".to(tl.float32)"
    precision = '"tf32"' if dtypes == {"bf16", "f16"} else '"ieee"'  # exact for both halves
    left = _address(spec, spec.left, ("i1", "depth_left"))
    right = _address(spec, spec.right, ("depth_right", "i2"))
    lines = [
        "item = tl.program_id(0).to(tl.int64)",
        f"across = ({n} + BLOCK_N - 1) // BLOCK_N",
        f"down = ({m} + BLOCK_M - 1) // BLOCK_M",
        "i0 = item // (across * down)",
        "i1 = (item // across % down * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]",
        "i2 = (item % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]",
        "sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        f"for start in range(0, {depth}, BLOCK_K):",
        "    i3 = start + tl.arange(0, BLOCK_K).to(tl.int64)",
        "    depth_left, depth_right = i3[None, :], i3[:, None]",
        f"    left_mask = (i1 < {m}) & (depth_left < {depth})",
        f"    right_mask = (depth_right < {depth}) & (i2 < {n})",
        f"    left = tl.load({left}, mask=left_mask, other=0.0){widen}",
        f"    right = tl.load({right}, mask=right_mask, other=0.0){widen}",
        f"    sums = product(left, right, sums, {precision})",
    ]
    result = "sums" if spec.alpha == 1 else f"{spec.alpha!r} * sums"
    lines.append(f"mask = (i1 < {m}) & (i2 < {n})")
    if spec.bias is not None:
        scale = "" if spec.beta == 1 else f"{spec.beta!r} * "
        place = _address(spec, spec.bias, ("i1", "i2"))
        lines.append(f"bias = tl.load({place}, mask=mask, other=0.0)")
        result = f"{scale}bias.to(tl.float32) + {result}"
    out = len(spec.operands) - 1
    place = _address(spec, Access(out, spec.store), ("i1", "i2"))
    return [*lines, f"tl.store({place}, {result}, mask=mask)"]


def _texts(spec: MatmulSpec) -> Texts:
    return Texts(spec.operands, (), 3, {})


def _address(spec: MatmulSpec, access: Access, tile: tuple[str, str]) -> str:
    """Return the pointers of an operand's tile, whose rows and columns have the names in `tile`.

    An operand that is expanded, or one element wide, does not depend on both: zeros of the tile's
    shape make its pointers as many as the mask's.
    """
    name = variable(spec.operands[access.operand], access.operand)
    address: Linear = access.address
    depth = next((at for at in tile if at.startswith("depth")), "i3")
    place = re.sub(r"\bi3\b", depth, _texts(spec).address(address))
    whole = all(re.search(rf"\b{at}\b", place) for at in tile)
    zeros = "" if whole else f" + tl.zeros_like({tile[0]} + {tile[1]})"
    return f"{name} + ({place}){zeros}"
