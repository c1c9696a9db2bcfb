"""Find every node outside attention that mixes different tokens.

In a flat batch the neighbours of a token belong to other sequences, so only attention, which knows
where a sequence starts, may mix tokens. The search follows shapes: a dimension whose size contains
T holds tokens, and an operation must keep each token where it is. What is not known to do so is
reported, so that nothing is generated from a model whose answers would depend on the batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from aios_compile.errors import UnsupportedModelError
from aios_compile.ir import ops, provenance
from aios_compile.ir.module import IRModule, is_region_call
from aios_compile.ir.symbols import size_names
from aios_compile.passes.match import END, RESHAPES, SPLITS, is_call, positive, shape_of, value_of
from aios_compile.passes.result import PassResult

aten = torch.ops.aten
aios = torch.ops.aios
assert ops.TABLE

ATTENTION_PASS = "raise_attention"
ATTENTION = (
    aios.attention.default,
    aios.paged_attention.default,
    aios.kv_write.default,
    aios.quantized_kv_write.default,
)
ROWWISE = (
    aios.linear.default,
    aios.bf16_linear.default,
    aios.expert_linear.default,
    aios.quantized_linear.default,
    aios.quantized_expert_linear.default,
    aios.rms_norm.default,
    aios.layer_norm.default,
    aios.rope.default,
    aios.gated_activation.default,
    aios.sample.default,
    aten.embedding.default,
    aten.native_layer_norm.default,
)
LAYOUTS = (
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.sym_size.int,
    aten.full.default,
    aten.full_like.default,
    aten.arange.default,
    aten.arange.start_step,
    aten.scalar_tensor.default,
    operator.getitem,
)
REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.linalg_vector_norm.default,
    aten.prod.dim_int,
    aten.var.correction,
    aten.var_mean.correction,
    aten.argmax.default,
    aten.any.dim,
    aten.max.dim,
    aten.min.dim,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.topk.default,
    aten.sort.default,
    aten.cat.default,
    aten.select.int,
    aten.gather.default,
    *SPLITS,
)
SCATTERS = (
    aten.scatter.value,
    aten.scatter.src,
    aten.scatter_add.default,
    aten.slice_scatter.default,
)
DIM_ARGUMENT = {
    aten.linalg_vector_norm.default: 2,
    aten.topk.default: 2,
    aten.split_with_sizes.default: 2,
    aten.split.Tensor: 2,
}


def note_token_mixing(module: IRModule, results: Sequence[PassResult]) -> None:
    """Record why a program cannot generate: where tokens mix, and why no attention was found there.

    Raises UnsupportedModelError for a scaled_dot_product_attention that was not recognised: it has
    no other form at the next level.
    """
    reasons = [r for result in results if result.name == ATTENTION_PASS for r in result.refusals]
    left = [
        n
        for graph_module in module.graphs().values()
        for n in graph_module.graph.find_nodes(op="call_function", target=aios.sdpa.default)
        if n.users
    ]
    if left:
        raise UnsupportedModelError(
            reasons[0] if reasons else "an attention that is not recognised",
            source_line=provenance.source_line(left[0]),
            advice="attention must be causal, or causal within a window or a chunk",
        )
    mixing = mixing_nodes(module)
    if mixing:
        line = provenance.source_line(mixing[0])
        why = "; ".join(dict.fromkeys(reasons))
        module.not_generatable = f"{line} mixes tokens outside attention" + (
            f" ({why})" if why else ""
        )


def mixing_nodes(module: IRModule) -> list[fx.Node]:
    """Return the nodes of all graphs that mix tokens outside attention, in order."""
    names = size_names(module.mode)
    symbols = {symbol for symbol, name in names.items() if name == "T"}
    found = []
    for graph_module in module.graphs().values():
        for node in graph_module.graph.nodes:
            outside = node.op == "call_function" and not is_call(node, *ATTENTION)
            if outside and node.users and _mixes(node, symbols):
                found.append(node)
            elif node.op == "call_module" and not is_region_call(graph_module, node):
                found.append(node)  # a kernel: the search belongs before them
    return found


def _token_dims(node: Any, symbols: set[str]) -> list[int]:
    """Return the dimensions of a value whose size contains T."""
    value = value_of(node)
    if value is None:
        return []
    return [
        i
        for i, size in enumerate(value.shape)
        if not isinstance(size, int) and symbols & {str(s) for s in size.node.expr.free_symbols}
    ]


def _mixes(node: Any, symbols: set[str]) -> bool:
    if _counts(node, symbols):
        return True
    inputs = [n for n in node.all_input_nodes if _token_dims(n, symbols)]
    if len(_token_dims(node, symbols)) > 1:
        return not any(len(_token_dims(n, symbols)) > 1 for n in inputs) or not _keeps(
            node, symbols
        )
    return bool(inputs) and not _keeps(node, symbols)


def _counts(node: Any, symbols: set[str]) -> bool:
    """Return whether a node numbers the tokens of a step, or cuts a table to as many rows."""
    if not is_call(node, aten.arange.default, aten.arange.start_step, aten.slice.Tensor):
        return False
    return bool(_token_dims(node, symbols)) and not any(
        _token_dims(n, symbols) for n in node.all_input_nodes
    )


def _keeps(node: Any, symbols: set[str]) -> bool:
    """Return whether every token of the inputs stays where it is."""
    if is_call(node, *RESHAPES):
        return _prefixes(node, symbols) == _prefixes(node.args[0], symbols)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, *ROWWISE, *LAYOUTS):
        return True
    if is_call(node, aten.slice.Tensor):
        return _keeps_slice(node, symbols)
    if is_call(node, *REDUCTIONS):
        return _keeps_reduction(node, symbols)
    if is_call(node, aten.mm.default, aten.bmm.default, aten.addmm.default):
        a, b = (_token_dims(n, symbols) for n in node.args[-2:])
        own = is_call(node, aten.bmm.default) and a == b == [0]  # a matrix for each token
        return own or (len(shape_of(node)) - 1 not in a and not b)
    if is_call(node, aten.repeat.default):
        counts, tokens = node.args[1], _token_dims(node.args[0], symbols)
        before = len(counts) - len(shape_of(node.args[0]))
        return all(counts[before + dim] == 1 for dim in tokens)
    if is_call(node, aten.flip.default):
        rank = len(shape_of(node))
        return not {positive(d, rank) for d in node.args[1]} & set(_token_dims(node, symbols))
    if is_call(node, aten.constant_pad_nd.default):
        pads, rank = node.args[1], len(shape_of(node))
        padded = {rank - 1 - i // 2 for i, count in enumerate(pads) if count != 0}
        return not padded & set(_token_dims(node.args[0], symbols))
    if is_call(node, *SCATTERS):
        return _keeps_scatter(node, symbols)
    if is_call(node, aten.index.Tensor):
        return _keeps_index(node, symbols)
    if is_call(node, aten.index_select.default):
        source, dim, index = node.args
        at = positive(dim, len(shape_of(source)))
        return _keeps_choice(source, at, index, symbols)
    return False


def _prefixes(node: Any, symbols: set[str]) -> list[Any]:
    """Return, for each dimension of tokens, the product of the sizes before it.

    A reshape keeps each token in its place where these stay the same: [T, 2, 8] and [2*T, 8] do,
    [2, T, 8] and [2*T, 8] do not.
    """
    sizes = [s if isinstance(s, int) else s.node.expr for s in node.meta["val"].shape]
    return [math.prod(sizes[:dim]) for dim in _token_dims(node, symbols)]


def _keeps_scatter(node: Any, symbols: set[str]) -> bool:
    """Return whether each token's values are written to the same token."""
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs
    inputs = [v for v in given.values() if value_of(v) is not None and shape_of(v)]
    tokens = _token_dims(node, symbols)
    dim = positive(given.get("dim", 0), len(shape_of(node)))
    return dim not in tokens and all(_token_dims(n, symbols) in (tokens, []) for n in inputs)


def _keeps_index(node: Any, symbols: set[str]) -> bool:
    source, indices = node.args
    chosen = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    return len(chosen) == 1 and _keeps_choice(source, *chosen[0], symbols)


def _keeps_choice(source: Any, dim: int, index: Any, symbols: set[str]) -> bool:
    """Return whether entries are looked up by token in a table, or the same ones for each token."""
    tokens = _token_dims(source, symbols)
    return not tokens or (dim not in tokens and not _token_dims(index, symbols))


def _keeps_slice(node: Any, symbols: set[str]) -> bool:
    dim = positive(node.args[1] if len(node.args) > 1 else 0, len(shape_of(node.args[0])))
    if dim not in _token_dims(node.args[0], symbols):
        return True
    start = node.args[2] if len(node.args) > 2 else 0
    stop = node.args[3] if len(node.args) > 3 else END
    whole = shape_of(node) == shape_of(node.args[0])
    return start in (0, None) and (stop in (END, None) or whole)


def _keeps_reduction(node: Any, symbols: set[str]) -> bool:
    """Return whether what is reduced, sorted, cut or joined is no dimension of tokens."""
    source = node.args[0][0] if is_call(node, aten.cat.default) else node.args[0]
    default = -1 if node.target in (aten.topk.default, aten.sort.default) else 0
    index = DIM_ARGUMENT.get(node.target, 1)
    dims = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    sources = node.args[0] if is_call(node, aten.cat.default) else [source]
    rank = len(shape_of(source))
    every = dims is None or dims == []
    reduced = range(rank) if every else dims if isinstance(dims, (list, tuple)) else [dims]
    named = {positive(d, rank) for d in reduced}
    return not any(named & set(_token_dims(s, symbols)) for s in sources)
