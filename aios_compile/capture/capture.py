"""Capture a causal language model's forward pass: nn.Module -> level 1 of the program.

Dynamo traces the module once; the layers become calls of one region (regions.py); the graph is
lowered to functional core ATen with the model's source line on every node; weights stay arguments,
bound to parameter names by identity, so that the module may live on the meta device.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn

from aios_compile.capture import foreign, regions, torch_private
from aios_compile.capture.assemble import LAST_ONLY, as_packed, assemble
from aios_compile.capture.call_convention import call_convention, without_last_token
from aios_compile.capture.foreign_rope import trained_frequencies
from aios_compile.capture.length_limit import guard_limits, line_of, table_limits
from aios_compile.capture.size_bounds import decide_bounds
from aios_compile.capture.substitutes import substituted
from aios_compile.errors import CaptureError, UnsupportedModelError
from aios_compile.ir import ops, provenance
from aios_compile.ir.module import IRModule, outputs
from aios_compile.ir.symbols import adopt_size, new_size

IN_PLACE = ("setitem", *(f"i{op}" for op in ("add", "sub", "mul", "truediv", "pow", "and", "or")))
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
CLAMPS = ("clamp_", "clamp_min_", "clamp_max_", "clip_")
TRACE_SIZES = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73)  # primes: no multiple of a tile or a head


def capture(
    model: nn.Module,
    *,
    flat: bool | None = None,
    max_tokens: int = 8192,
    max_length: int | None = None,
) -> IRModule:
    """Return level 1 of `model`, whose forward(input_ids, position_ids) gives logits.

    flat: token ids are [T] (True), [1, T] (False), or whichever the module takes (None, [1, T]
    first). max_tokens: the largest T that will run, unless the module's length_limit is less.
    max_length: the longest sequence that will run, if that is known.
    Raises CaptureError with the model's source line when the forward does not capture as one graph.
    """
    _check_has_code(model)
    call_convention(model)
    with foreign.evaluating(model), trained_frequencies(model, max_length):
        try:
            return _in_regions_or_whole(model, flat is True, max_tokens)
        except CaptureError as error:
            if flat is not None or error.__cause__ is None:  # it ran, and was refused by its graph
                raise
            with contextlib.suppress(CaptureError):
                return _in_regions_or_whole(model, True, max_tokens)
            raise


def _in_regions_or_whole(model: nn.Module, flat: bool, max_tokens: int) -> IRModule:
    """Capture with one region a layer class, or without where a region is in the way."""
    try:
        return _capture(model, flat, max_tokens)
    except CaptureError as error:
        aliases = "aliasing" in str(error.__cause__)  # a layer gives out what it got, or weight.T
        if not (aliases or torch_private.hides_message(error.__cause__)):
            raise
    return _capture(model, flat, max_tokens, whole=True)


def _capture(model: nn.Module, flat: bool, max_tokens: int, whole: bool = False) -> IRModule:
    """Capture with one region a layer class; with `whole` every layer in the outer graph."""
    marked: Any = contextlib.nullcontext if whole else regions.marked
    size = _trace_size(model)
    ids = torch.zeros(size, dtype=torch.long)
    positions = torch.arange(size)
    if not flat:
        ids, positions = ids[None], positions[None]
    with foreign.adapted(model) as (wrapped, kwargs), marked(wrapped) as lists:
        given = {**call_convention(wrapped).arguments(ids, positions), **kwargs}
        with _captured_errors(), torch_private.capture_settings(), substituted():
            graph_input = torch_private.full_graph(wrapped, given)
        outer = getattr(graph_input, "graph_module", None)
        if outer is None or not outer.graph.output_node().all_input_nodes:
            raise CaptureError("forward computes no tensor, expected the logits")
        examples = _drop_unused(outer, graph_input.example_inputs)
        holders = [n for n in outer.graph.nodes if n.op == "placeholder"]
        fakes = [as_packed(n.meta["example_value"]) for n in holders]
        mode = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
        last_only = keep_all_tokens(outer)
        _adopt_token_count(mode, fakes)
        with _captured_errors():
            keep_composites(outer)
            decide_bounds([outer, *_children(outer)], max_tokens)
            with mock.patch.object(F, "scaled_dot_product_attention", _sdpa):  # within others
                lowered = torch_private.lower(outer, fakes, mode)
    limits = guard_limits(mode, max_tokens, _sizes(model))
    names = _names(wrapped)
    inputs = {id(ids): "token_ids", id(positions): "positions"}
    bindings = [_binding(h, e, names, inputs) for h, e in zip(holders, examples)]
    layers = [] if whole else list(lists)
    module = assemble(outer, lowered, bindings, layers, _is_in_files(model))
    module.root.meta[LAST_ONLY] = last_only
    _check_logits(module)
    module.length_limit = min((*limits, *table_limits(module)), default=None)
    return module


def _check_has_code(model: nn.Module) -> None:
    """Refuse a module, or a part of it, that is TorchScript."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name or 'the module'} is scripted or traced (torch.jit): no Python code is left",
                advice="pass the module as it was before",
            )


def _is_in_files(model: nn.Module) -> bool:
    """Return whether dynamo can tell the lines: code typed into a prompt has none."""
    forwards = (inspect.unwrap(type(module).forward) for module in model.modules())
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return all(code is None or Path(code.co_filename).is_file() for code in codes)


def _check_logits(module: IRModule) -> None:
    """Refuse what is no matrix of floats [T, vocabulary]."""
    node = outputs(module.root.graph)[0]
    value = node.meta["val"]
    tokens = new_size(module.mode, "T").node.expr
    rows = value.shape[0] if value.dim() == 2 else 0
    if not value.is_floating_point() or isinstance(rows, int) or rows.node.expr != tokens:
        sizes = ", ".join("T" if str(s) == str(tokens) else str(s) for s in value.shape)
        raise CaptureError(
            f"forward returns {value.dtype} [{sizes}], expected float logits [T, vocabulary] of "
            "all T tokens",
            source_line=provenance.source_line(node) or None,
        )


def _drop_unused(outer: fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
    """Erase inputs that nothing reads: positions nobody uses would bring a second token count."""
    for node in reversed(outer.graph.nodes):
        if not node.users and not _has_effect(node):
            outer.graph.erase_node(node)
    holders = [n for n in outer.graph.nodes if n.op == "placeholder"]
    kept = []
    for holder, example in zip(holders, examples):
        if holder.users:
            kept.append(example)
        else:
            outer.graph.erase_node(holder)
    return kept


def _has_effect(node: fx.Node) -> bool:
    """Return whether a node of dynamo's graph does more than make its value."""
    if node.op not in ("call_function", "call_method") or node.is_impure():
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    given = {"inplace", "out"} & set(node.kwargs)
    return name.endswith("_") or name in IN_PLACE or bool(given)


def _trace_size(model: nn.Module) -> int:
    """Return a token count that equals no size of the model, so that none is taken for T."""
    sizes = _sizes(model)
    return next(n for n in TRACE_SIZES if all(s % n for s in sizes if s))


def _sizes(model: nn.Module) -> set[int]:
    """Return every size of the model's parameters and buffers."""
    return {s for x in (*model.parameters(), *model.buffers()) for s in x.shape}


@contextlib.contextmanager
def _captured_errors() -> Iterator[None]:
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        refused = foreign.refusal_in(str(error))
        if refused is not None:
            raise UnsupportedModelError(refused, source_line=_frame_in(error)) from error
        raise CaptureError(
            f"the forward pass does not capture as one graph: {torch_private.reason_of(error)}",
            source_line=_frame_in(error),
            advice="data-dependent Python (.item(), loops over tokens) must become tensor code",
        ) from error


def _frame_in(error: Exception) -> str | None:
    """Return the innermost line of user code that dynamo's message, or its error, names."""
    frames = _FRAME.findall(str(error))
    if not frames:  # an operation that fails on fake tensors: the stack is beside the message
        stack = getattr(error, "real_stack", None) or ()
        frames = [(f.filename, str(f.lineno), f.name, f.line or "") for f in stack]
    frames = [f for f in frames if not f[0].startswith(_LIBRARIES)] or frames
    if not frames:
        return None
    path, line, function, text = frames[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line} in {function}: {text.strip()}"


def _adopt_token_count(mode: Any, fakes: list[Any]) -> None:
    """Name the one symbolic size T; anything else that is symbolic is an error."""
    symbols: dict[str, Any] = {}
    for fake in fakes:
        for size in fake.shape if isinstance(fake, torch.Tensor) else [fake]:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols[str(size.node.expr)] = size
    if not symbols:
        lines = [line_of(guard.sloc) for guard in mode.shape_env.guards]
        raise CaptureError(
            "the model fixes the token count while it runs",
            source_line=next((line for line in reversed(lines) if line), None),
            advice="Python loops over tokens must become tensor code",
        )
    if len(symbols) != 1:
        raise CaptureError(
            f"the captured graph has {len(symbols)} symbolic sizes ({', '.join(symbols) or 'none'})"
            ", expected exactly one, the token count",
            advice="check that input_ids and position_ids have the same length in the model",
        )
    adopt_size(mode, "T", next(iter(symbols.values())))


def keep_composites(outer: fx.GraphModule) -> None:
    """Replace torch functions that must stay whole through lowering by aios ops."""
    for module in [outer, *_children(outer)]:
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
                node.target = _sdpa
            elif node.op == "call_method" and node.target in CLAMPS:
                _out_of_place(node)
            elif node.target is operator.getitem:
                node.args = (node.args[0], _as_slices(node.args[1]))
        module.recompile()


def keep_all_tokens(outer: fx.GraphModule) -> bool:
    """Take x for x[:, [-1], :] where the logits are the last token's; return whether they were.

    A model that generates for itself asks for no others (nanoGPT); here a step takes the rows that
    it needs, of several sequences. What comes after must be token-wise, which is checked.
    """
    logits = outer.graph.output_node().all_input_nodes[0].meta.get("example_value")
    if logits is None or any(isinstance(size, torch.SymInt) for size in logits.shape):
        return False
    found = False
    for node in list(outer.graph.find_nodes(op="call_function", target=operator.getitem)):
        value = node.args[0].meta.get("example_value")
        if isinstance(value, torch.Tensor) and without_last_token(value.shape, node.args[1]):
            node.replace_all_uses_with(node.args[0])
            outer.graph.erase_node(node)
            found = True
    return found


def _as_slices(index: Any) -> Any:
    """Return x[..., [i], :] as x[..., i:i+1, :]: a view, and not a gather by a constant tensor."""
    if not isinstance(index, tuple) or sum(isinstance(i, (list, fx.Node)) for i in index) != 1:
        return index
    return tuple(
        slice(i[0], i[0] + 1 or None) if _is_one_int(i) else i  # -1 + 1 would be an empty slice
        for i in index
    )


def _is_one_int(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 1 and type(item[0]) is int


def _out_of_place(node: fx.Node) -> None:
    """x.clamp_(a) -> x.copy_(x.clamp(a)): torch 2.13 cannot functionalize the first with T."""
    with node.graph.inserting_before(node):
        new = node.graph.call_method(str(node.target).rstrip("_"), node.args, node.kwargs)
    new.meta = dict(node.meta)
    node.target, node.args, node.kwargs = "copy_", (node.args[0], new), {}


def _sdpa(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p:
        raise CaptureError(
            f"attention with dropout_p={dropout_p} in eval mode",
            advice="pass dropout_p=0.0 unless self.training",
        )
    return torch.ops.aios.sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa)


def _children(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [child for _, child in module.named_children() if isinstance(child, fx.GraphModule)]


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        names[id(buffer)].append(name)
    return names


def _binding(
    holder: fx.Node, example: Any, names: dict[int, list[str]], inputs: dict[int, str]
) -> Any:
    """Say what an input is: ("size",), ("input", name), ("weight", names, x), ("constant", x)."""
    if not isinstance(example, torch.Tensor):
        return ("size", "T")
    if id(example) in names:
        return ("weight", tuple(names[id(example)]), example)
    if id(example) in inputs:
        return ("input", inputs[id(example)])
    return ("constant", holder.name, example)


assert ops.TABLE, "the op table must be registered before a graph is lowered"
