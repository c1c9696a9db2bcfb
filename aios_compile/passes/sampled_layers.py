"""Choose the layers that a certificate runs: one of each region, and each that is bound oddly.

All calls of a region share one graph, so proving one call proves them all, as long as every call
binds the same things under its own layer's names. A pass that gives one layer its neighbour's
weights breaks that rule, so that layer is run as well. If a pass changes which layer reads from
which, this shows only when no layer is skipped.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any

from torch import fx

from aios_compile.ir import evaluate
from aios_compile.ir.module import IRModule, Recipe, is_region_call, outputs

_texts: weakref.WeakKeyDictionary[fx.Graph, str] = weakref.WeakKeyDictionary()


def choose_skips(
    before: IRModule, after: IRModule, index: int
) -> tuple[evaluate.Skips, evaluate.Skips]:
    """Choose the region calls that both programs pass through in sample `index`, by name.

    All but the first, the last or the middle one of each region by turns; the second sample runs
    one of every other kind of call as well (see above). None where the layers are wired otherwise
    after than before.
    """
    tables = evaluate.carried(before), evaluate.carried(after)
    calls = [{r: m.calls(r) for r in m.regions()} for m in (before, after)]
    counts = [{r: len(found) for r, found in c.items()} for c in calls]
    if tables[0] is None or tables[1] is None or counts[0] != counts[1]:
        return {}, {}
    if _wires(before) != _wires(after):
        return {}, {}
    kept = set[str]()
    for region, of_before in calls[0].items():
        pairs = list(zip(of_before, calls[1][region]))
        turns = (0, len(pairs) - 1, len(pairs) // 2)
        chosen = {turns[index % 3]}
        if index % 3 == 1 and len(pairs) > 2:
            chosen |= _others(before, after, pairs, set(turns))
        kept |= {call.name for i in chosen for call in pairs[i]}
    skips = [{n: p for n, p in table.items() if n not in kept} for table in tables if table]
    return (skips[0], skips[1]) if len(skips) == 2 else ({}, {})


def _others(
    before: IRModule, after: IRModule, pairs: list[tuple[fx.Node, fx.Node]], known: set[int]
) -> set[int]:
    """Return one call of every kind that is not among the `known` ones."""
    kinds = [_kind(before, after, *pair) for pair in pairs]
    seen, found = {kinds[i] for i in known}, set()
    for i, kind in enumerate(kinds):
        if kind not in seen:
            seen.add(kind)
            found.add(i)
    return found


def _kind(before: IRModule, after: IRModule, *calls: fx.Node) -> tuple[Any, ...]:
    """Return what a call is bound to before and after, its own names numbered as they come."""
    numbers: dict[str, int] = {}
    return tuple(
        tuple(_bound(module, argument, numbers) for argument in call.args)
        for module, call in zip((before, after), calls)
    )


def _bound(module: IRModule, argument: Any, numbers: dict[str, int]) -> object:
    if not isinstance(argument, fx.Node):
        return repr(argument)
    recipe = module.weights.get(argument.name)
    if recipe is not None:
        names = (numbers.setdefault(name, len(numbers)) for name in recipe.names)
        return _text(recipe), *names
    if argument.name in module.states:
        return "state", numbers.setdefault(f"state {argument.name}", len(numbers))
    if _from_layer(argument) is not None:
        return "layer", argument.args[1]
    return module.inputs.get(argument.name, argument.name)


def _text(recipe: Recipe) -> str:
    """Return what a recipe computes, of whatever tensors."""
    if recipe.graph not in _texts:
        names = tuple(f"w{i}" for i in range(len(recipe.names)))
        _texts[recipe.graph] = Recipe(recipe.graph, names).text()
    return _texts[recipe.graph]


def _wires(module: IRModule) -> set[tuple[int, int]]:
    """Return which call reads which one's results, by number; -1 reads for all that is no call."""
    root = module.root
    calls = [n for n in root.graph.nodes if n.op == "call_module" and is_region_call(root, n)]
    numbers = {call: i for i, call in enumerate(calls)}
    states = {i for i in module.states.values() if i >= 0}
    kept = {v for i, v in enumerate(outputs(root.graph)) if i not in states}
    found = set()
    for item in root.graph.nodes:
        call = _from_layer(item)
        if call is None:
            continue
        users = {u for u in item.users if u.op != "output" or item in kept}
        found |= {(numbers.get(user, -1), numbers[call]) for user in users}
    return found


def _from_layer(node: fx.Node) -> fx.Node | None:
    """Return the region call that a node is a result of."""
    if node.target is not operator.getitem or not isinstance(call := node.args[0], fx.Node):
        return None
    owner = call.graph.owning_module
    assert owner is not None
    return call if is_region_call(owner, call) else None
