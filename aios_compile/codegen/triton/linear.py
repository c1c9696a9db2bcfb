"""y[t, n] = f(sum over k of x[t, k] * w[n, k], ...): a linear layer with any pointwise tail.

One module, one variant for each range of rows (configs.py): up to 4 tokens the weights stream
through the vector units (skinny_linear.py), up to 32 through the tensor cores with all tokens in
one tile, beyond that in tiles of tokens (tile_linear.py). Layouts, spec: linear_spec.py. Sums are
float32 in an order that is fixed for a class of steps by their tokens (docs/targets.md).
Half-precision weights meet float32 activations as the sum of two parts of the weights' precision
(16 bits of mantissa for bf16, 22 for f16): `parts` in the spec's module text, no rounding to half.
A norm of x is a prologue of the kernels for few tokens, a launch of its own before the tiles.
Bytes: w once for up to 64 tokens; x and the tail's operands once a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from aios_compile.codegen.expression import formula
from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import (
    candidate_variants,
    choice,
    descriptor_linear,
    library_linear,
    linear_spec,
    norm_prologue,
    skinny_linear,
    split_depth,
    tile_linear,
)
from aios_compile.codegen.triton.candidate_variants import Others, candidates
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Choice, Tuning
from aios_compile.codegen.triton.configs import Config, Problem
from aios_compile.codegen.triton.dependent_launch import with_dependent_launch
from aios_compile.codegen.triton.frame import Launch, module_text
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import PRODUCT

spec_of = linear_spec.spec_of
TILED = ("tile", "descriptor", "library")  # kinds for many tokens


def reference(spec: LinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the outputs in eager PyTorch: the body is the definition."""
    return body(*tensors)


def problem_of(spec: LinearSpec) -> Problem:
    """Return the sizes that the cost model needs."""
    weight, x = spec.weight.operand.dtype, spec.x.operand.dtype
    parts = 2 if x == "f32" and weight != "f32" else 1
    sizes = (spec.columns, spec.depth, spec.streams, BYTES[weight], BYTES[x])
    return Problem(*sizes, parts, spec.norm is not None)


def choices(spec: LinearSpec, card: Card = DEFAULT, tuning: Tuning | None = None) -> list[Choice]:
    """Return the choice for each range of rows; tuning: with what the compiler reports."""

    def build(config: Config) -> KernelSource:
        source = emit(spec, card, ((None, config),))
        return with_dependent_launch(source) if card.dependent_launch else source

    def described(config: Config) -> Config | None:
        """Return a tile through tensor descriptors, where the card and the layout have them."""
        fits = config.kind == "tile" and (spec.norm or descriptor_linear.serves(spec, card))
        return replace(config, kind="descriptor") if fits and card.dependent_launch else None

    return choice.choose(problem_of(spec), card, tuning, build, also=described)


def choose(spec: LinearSpec, card: Card = DEFAULT) -> list[tuple[int | None, Config]]:
    """Return the model's configuration of each range of rows."""
    return [(c.most, c.config) for c in choices(spec, card)]


def emit(
    spec: LinearSpec, card: Card = DEFAULT,
    chosen: Sequence[tuple[int | None, Config]] | None = None,
    tuning: Tuning | None = None,
) -> KernelSource:  # fmt: skip
    """Return the module; its head says why each configuration was chosen.

    chosen: overrides the choice; tuning: lets the compiler report on candidates.
    """
    symbol, reasons = symbol_of(spec.name, (spec, chosen, card.target)), []
    others: Others = {}
    if chosen is None:
        made = choices(spec, card, tuning)
        chosen, reasons = [(c.most, c.config) for c in made], [c.text() for c in made]
        others = {c.most: c.others for c in made}
    chosen = [(most, replace(c, prefetch=card.dependent_launch)) for most, c in chosen]
    others = {
        most: tuple(replace(c, prefetch=card.dependent_launch) for c in found)
        for most, found in others.items()
    }
    used = candidate_variants.used(chosen, others)
    shared = [skinny_linear.shared(spec, config) for config in used]
    workspace = split_depth.workspace(spec, shared)
    if spec.norm is not None and any(config.kind in TILED for config in used):
        workspace.append(norm_prologue.normed_operand(spec))
    if any(config.kind == "library" for config in used):
        workspace += library_linear.workspace(spec)
    counters = split_depth.counters(shared)
    operands = [*spec.operands, *workspace, *split_depth.counter_operand(counters)]
    kernels, variants = candidate_variants.variants(
        symbol, chosen, others, lambda config, name: _variant(spec, operands, config, name, card)
    )
    names = [o.name for o in spec.operands]
    leaves = [(names + [f"sum{s}" for s in range(spec.streams)])[x.operand] for x in spec.leaves]
    comment = [f"{spec.name}: sums over {spec.depth} inputs for {spec.columns} columns"]
    comment += [f"  out{i} = {formula(v, leaves)}" for i, v in enumerate(spec.values)]
    comment += [f"  {layout(o)}" for o in spec.operands]
    comment += [f"chosen for {reason}" for reason in reasons]
    comment += [f"model: {line}" for line in spec.lines]
    rows = spec.x.operand.shape[0]
    text = module_text(comment, operands, [PRODUCT, *kernels], variants, rows, workspace)
    return KernelSource(
        spec.name, symbol, "triton", text, len(spec.operands), linear_spec.inplace(spec),
        spec.lines, tuple(workspace), counters,
        candidates=candidates(others, problem_of(spec).signature("linear")),
    )  # fmt: skip


def _variant(
    spec: LinearSpec, operands: list[Operand], config: Config, name: str, card: Card
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel functions of a configuration and their launches."""
    if config.kind not in TILED:
        return skinny_linear.kernels(spec, operands, config, name)
    build = tile_linear.kernels
    if config.kind == "descriptor":
        build = partial(descriptor_linear.kernels, card=card)
    elif config.kind == "library":
        build = library_linear.kernels
    if spec.norm is None:
        return build(spec, operands, config, name)
    text, launch = norm_prologue.rows_kernel(spec, operands, f"{name.rpartition('_')[0]}_norm")
    normed = norm_prologue.after_norm(spec, operands)
    texts, launches = build(normed, operands, config, name)
    return [text, *texts], (launch, *launches)
