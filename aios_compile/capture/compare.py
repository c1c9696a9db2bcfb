"""Check the capture right away: run the model and level 1 on the same random weights, few tokens.

In both, only the first layer of each region kind computes; the other layers pass their input on.
The vocabulary is cut to a few rows where the graph allows it. So the check is cheap at any depth.
It works for a module on the meta device too, because the module's own parameters are never read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from aios_compile.capture import foreign, regions
from aios_compile.capture.assemble import BATCHED, LAST_ONLY
from aios_compile.capture.call_convention import call_convention, logits_in
from aios_compile.errors import CaptureError
from aios_compile.ir import evaluate, random_weights
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.random_weights import RandomWeights

TOKENS = (1, 5)
ROUNDINGS, LEAST = 16.0, 1e-5  # decompositions may round differently, nothing else may differ


def compare_with_eager(
    model: nn.Module, module: IRModule, seed: int = 0, flat: bool | None = None
) -> float:
    """Run `model` and its capture; return the largest difference, relative to the largest value.

    flat: token ids are [T] and not [1, T]; None reads it off the capture. Raises CaptureError that
    names the first layer whose result differs.
    """
    if flat is None:
        flat = not module.root.meta.get(BATCHED, False)
    layers = [layer for group in regions.layer_lists(model).values() for layer in group]
    calls = [n for n in module.root.graph.nodes if n.op == "call_module"]
    active = _first_of_each_kind(calls, len(layers))
    repeated = len({id(layer) for layer in layers}) < len(layers)  # one module in several places
    table = evaluate.carried(module) if len(layers) == len(calls) and not repeated else None
    if table is None:
        active = set(range(len(layers)))
    skips = {c.name: table[c.name] for i, c in enumerate(calls) if table and i not in active}
    vocabulary = 0 if _keeps_vocabulary(model) else random_weights.shrinkable_vocabulary(module)
    weights = RandomWeights.of(module, seed, vocabulary)
    worst = 0.0
    for num_tokens in TOKENS:
        ids, positions = _batch(num_tokens, weights, seed, flat)
        seen, eager = _run_eager(model, module, weights, layers, active, (ids, positions), skips)
        found, logits = _run_captured(
            module, weights, skips, ids.reshape(-1), positions.reshape(-1)
        )
        logits = logits[-1:] if module.root.meta.get(LAST_ONLY) else logits
        worst = max(worst, _check(list(zip(found, seen)), (logits, eager), num_tokens))
    return worst


def _first_of_each_kind(calls: Sequence[fx.Node], count: int) -> set[int]:
    """Return the places of the first call of each region; all where calls are not the layers."""
    if len(calls) != count:
        return set(range(count))
    targets = [str(c.target) for c in calls]
    return {targets.index(t) for t in targets}


def _keeps_vocabulary(model: nn.Module) -> bool:
    """Return whether an embedding has a padding row past the rows that a cut table would have."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return any((t.padding_idx or 0) >= random_weights.VOCABULARY_ROWS for t in tables)


def _batch(num_tokens: int, weights: RandomWeights, seed: int, flat: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = random_weights.VOCABULARY_ROWS if weights.vocabulary else 2
    ids = torch.randint(0, rows, (num_tokens,), generator=generator)
    positions = torch.arange(num_tokens)
    return (ids, positions) if flat else (ids[None], positions[None])


def _run_eager(
    model: nn.Module,
    module: IRModule,
    weights: RandomWeights,
    layers: Sequence[nn.Module],
    active: set[int],
    batch: tuple[Tensor, Tensor],
    skips: evaluate.Skips,
) -> tuple[list[Tensor], Tensor]:
    """Return the results of the active layers and the logits."""
    given = _parameters(model, module, weights, skips)
    kwargs: dict[str, Any] = call_convention(model).arguments(*batch)
    if foreign.is_hugging_face(model):
        kwargs["use_cache"] = False
    seen: list[Tensor] = []
    with torch.no_grad(), foreign.evaluating(model), _passed_through(layers, active, seen):
        result = torch.func.functional_call(model, given, (), kwargs, tie_weights=False)
    logits = logits_in(result)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"forward returns a {type(result).__name__}, expected the logits")
    return seen, logits


def _parameters(
    model: nn.Module, module: IRModule, weights: RandomWeights, skips: evaluate.Skips
) -> dict[str, Tensor]:
    """Return random values for the parameters that something active reads.

    By every name of a tied parameter, but by one name of a module that has several places: put in
    twice, the model's own parameter would not come back.
    """
    own = {
        name
        for place, holder in model.named_modules()
        for name, _ in holder.named_parameters(place, recurse=False, remove_duplicate=False)
    }
    given: dict[str, Tensor] = {}
    for node in placeholders(module.root.graph):
        recipe = module.weights.get(node.name)
        if recipe is None or all(user.name in skips for user in node.users):
            continue
        for name in recipe.names:
            for alias in module.aliases.get(name, (name,)):
                if alias in own:
                    given[alias] = weights.tensor(name)
    return given


@contextlib.contextmanager
def _passed_through(
    layers: Sequence[nn.Module], active: set[int], seen: list[Tensor]
) -> Iterator[None]:
    """Let inactive layers return their input; collect the results of the active ones."""
    style: dict[str, int] = {}

    def record(_layer: nn.Module, _args: Any, result: Any) -> None:
        style["length"] = len(result) if isinstance(result, (tuple, list)) else 0
        seen.append(result[0] if isinstance(result, (tuple, list)) else result)

    watched = {id(layers[i]): layers[i] for i in active}
    hooks = [layer.register_forward_hook(record) for layer in watched.values()]
    skipped = [layer for i, layer in enumerate(layers) if i not in active]
    for layer in skipped:
        layer.forward = _identity(style)
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward
        for hook in hooks:
            hook.remove()


def _identity(style: dict[str, int]) -> Callable[..., Any]:
    """Return a forward that gives its input back, as the first of a layer's usual results."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        length = style.get("length", 0)
        return (x, *[None] * (length - 1)) if length else x

    return forward


def _run_captured(
    module: IRModule, weights: RandomWeights, skips: evaluate.Skips, ids: Tensor, positions: Tensor
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Return (region, first result) of every active call, and the logits."""
    runtime = {"token_ids": ids, "positions": positions}
    values: list[Tensor] = []
    for node in placeholders(module.root.graph):
        if node.name in module.inputs:
            values.append(runtime[module.inputs[node.name]])
        elif all(user.name in skips for user in node.users):
            values.append(torch.empty(0))
        else:
            values.append(weights.weight(module.weights[node.name]))
    found: list[tuple[str, Tensor]] = []

    def observe(node: fx.Node, result: Any) -> None:
        found.append((str(node.target), result[0]))

    with torch.no_grad():
        result = evaluate.call(module.root, values, skips=skips, observe=observe, exact_halves=True)
    return found, result[0]


def _check(
    pairs: Sequence[tuple[tuple[str, Tensor], Tensor]],
    logits: tuple[Tensor, Tensor],
    num_tokens: int,
) -> float:
    """Compare layer by layer, then the logits; return the largest difference."""
    worst = 0.0
    named = [(f"region {name}", found, eager) for (name, found), eager in pairs]
    for name, found, eager in [*named, ("the logits", *logits)]:
        if found.numel() != eager.numel():
            shapes = f"{tuple(found.shape)} for {tuple(eager.shape)}"
            raise CaptureError(f"{name}: the captured graph gives shape {shapes} at T={num_tokens}")
        a, b = found.reshape(-1).double(), eager.reshape(-1).double()
        gap = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        if not gap <= max(LEAST, ROUNDINGS * torch.finfo(eager.dtype).eps):
            raise CaptureError(
                f"{name}: the captured graph differs from eager by {gap:.1e} at T={num_tokens}",
                advice="capture froze something that the model depends on (a length, a flag)",
            )
        worst = max(worst, gap)
    return worst
