"""What the fusing passes share: kinds of ops, tails with one escaping value, names of kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from aios_compile.ir import ops

assert ops.TABLE, "the op table registers the aios operators"
aten = torch.ops.aten
aios = torch.ops.aios

RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
VIEWS = RESHAPES | {
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.alias.default,
}
NORMS = frozenset({aios.rms_norm.default, aios.layer_norm.default})
REDUCTIONS = frozenset(
    {
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.var.correction,
        aten.prod.dim_int,
        aten.any.dim,
        aten._softmax.default,
        aten._log_softmax.default,
    }
)
_MORE_POINTWISE = frozenset({aten._to_copy.default, aios.gated_activation.default})
MAX_NAME_PARTS = 4


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether a value is a call_function node of one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_view(node: Any) -> bool:
    """Return whether a node only renames elements: an alias with an offset and strides."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in VIEWS


def is_pointwise(node: Any) -> bool:
    """Return whether each output element depends on the inputs' elements at the same index only."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or node.target in _MORE_POINTWISE


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return a tensor's shape with symbolic sizes as comparable expressions."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in node.meta["val"].shape)


def through_views(node: Any) -> Any:
    """Return the value that a chain of views starts from."""
    while is_view(node) or is_call(node, operator.getitem):
        node = node.args[0]
    return node


def tail(
    root: fx.Node, refusal: Callable[[fx.Node, fx.Node], str | None]
) -> tuple[list[fx.Node], str]:
    """Grow a group forward from `root` so that always exactly one of its values escapes.

    refusal(node, end) says why `node` cannot join a group whose escaping value is `end`, or None.
    Return (members, why it stopped). The group is convex: a path that left it
    would be a second escaping value.
    """
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    members, end = [root], root
    while True:
        added, new_end, reason = _extension(members, end, refusal, order)
        if new_end is None:
            return members, reason
        members, end = members + added, new_end


def _extension(
    members: Sequence[fx.Node],
    end: fx.Node,
    refusal: Callable[[fx.Node, fx.Node], str | None],
    order: dict[fx.Node, int],
) -> tuple[list[fx.Node], fx.Node | None, str]:
    """Add users of `end`, nearest first, until exactly one value is used outside again."""
    inside, added = set(members), list[fx.Node]()
    while True:
        opened = [n for n in (end, *added) if any(u not in inside for u in n.users)]
        if added and len(opened) == 1 and opened[0] is not end:
            return added, opened[0], ""
        outside = {u for n in opened for u in n.users if u not in inside}
        if not outside:
            return [], None, ""
        node = min(outside, key=order.__getitem__)
        reason = refusal(node, end)
        if reason is not None:
            return [], None, reason
        inside.add(node)
        added.append(node)


def kernel_name(nodes: Iterable[fx.Node]) -> str:
    """Return a noun for a group: its ops in order, each once; of many the first and last."""
    names = [
        str(n.target).split(".")[-2 if "." in str(n.target) else -1].removeprefix("_")
        for n in nodes
        if not is_view(n) and not is_call(n, operator.getitem)
    ]
    parts = list(dict.fromkeys(names))
    if len(parts) > MAX_NAME_PARTS:
        parts = [parts[0], *parts[-MAX_NAME_PARTS + 1 :]]
    return "_".join(parts)


def getitems(node: fx.Node) -> list[fx.Node]:
    """Return the getitem users of a node with several results."""
    return [u for u in node.users if is_call(u, operator.getitem)]
