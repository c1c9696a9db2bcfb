"""PyTorch's own samples (OpInfo) of every operator that the compiler knows, through the compiler.

What a kernel can be made of is in the tables of codegen and of the passes; the samples are torch's:
shapes, strides, scalars, broadcasts and dtypes that its own tests call an operator with. What is
not supported must be a typed error. Needs expecttest, which torch's testing code imports.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aios_compile.codegen import pointwise_ops, reductions
from aios_compile.errors import AiosError, CaptureError, ConfigError
from aios_compile.ir import snapshot
from aios_compile.passes import form_kernels, fusion_groups
from aios_compile.passes.measure import one_thread
from aios_compile.passes.pipeline import FUSE, RAISE
from aios_compile.study.fuzz.builder import NAMES
from aios_compile.study.fuzz.compile_graph import compile_graph, prepare
from aios_compile.study.fuzz.example import REFUSALS
from aios_compile.study.fuzz.judge import FACTOR, compare, second_opinion
from aios_compile.study.fuzz.trace_function import trace

# Rows of the op table (ir/ops.py) by the function whose samples are theirs.
SEMANTIC = {
    "nn.functional.linear": "linear",
    "nn.functional.rms_norm": "rms_norm",
    "nn.functional.layer_norm": "layer_norm",
    "nn.functional.scaled_dot_product_attention": "sdpa",
    "nn.functional.embedding": "quantized_embedding",
    "nn.functional.silu": "gated_activation",
    "nn.functional.gelu": "gated_activation",
}
DTYPES = (torch.float32, torch.int64, torch.bool)
MAX_ELEMENTS = 4096


@dataclass
class Counts:
    """What became of the samples of the operators. refused: operator -> reasons."""

    right: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    def refuse(self, name: str, reason: str) -> None:
        """Count a sample that is not supported."""
        self.refused.setdefault(name, Counter())[reason[:160]] += 1


def known_operators() -> set[str]:
    """Return the names of the aten operators that kernels are made of, or that are views."""
    names = {n.removeprefix("aten::") for n in (*pointwise_ops.RULES, *reductions.RULES)}
    targets = (*form_kernels.KINDS, *fusion_groups.VIEWS)
    names |= {str(t).split(".")[1] for t in targets if str(t).startswith("aten.")}
    return {n for n in names if not n.startswith("_")} | {"softmax", "log_softmax", "softplus"}


def operators(database: Any = None) -> dict[str, Any]:
    """Return the OpInfo of each operator that is known, by name. Raises ConfigError without one."""
    if database is None:
        try:
            from torch.testing._internal.common_methods_invocations import op_db as database
        except ImportError as error:
            raise ConfigError(
                f"torch's samples cannot be imported: {error}", advice="pip install expecttest"
            ) from error
    known = known_operators()
    found = {}
    for op in database:
        plain = op.name.removeprefix("nn.functional.").removeprefix("special.")
        wanted = op.name in SEMANTIC or plain in known or (op.aten_name or "") in known
        if wanted and not op.variant_test_name:
            found[op.name] = op
    return found


def run_operator(op: Any, counts: Counts, objects: Path, most: int, skip: int = 0) -> None:
    """Compile at most `most` samples of an operator, each for itself, after leaving out `skip`."""
    taken = 0
    for sample in itertools.islice(_samples(op), skip, None):
        if taken >= most:
            break
        tensors = [t for t in pytree.tree_leaves(sample) if isinstance(t, Tensor)]
        small = sum(t.numel() for t in tensors) <= MAX_ELEMENTS
        if not tensors or not small or any(t.numel() == 0 or t.dtype not in NAMES for t in tensors):
            continue
        taken += 1
        with one_thread():
            _run_sample(op, sample, tensors, counts, objects)
    if not taken:
        counts.without.append(op.name)


def _samples(op: Any) -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        if dtype not in op.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
            yield sample.input, tuple(sample.args), dict(sample.kwargs)
        if dtype is torch.float32:
            return


def _run_sample(op: Any, sample: Any, tensors: list[Tensor], counts: Counts, objects: Path) -> None:
    leaves, spec = pytree.tree_flatten(sample)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        values = iter(given)
        filled = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        first, args, named = pytree.tree_unflatten(filled, spec)
        result = op.op(first, *args, **named)
        return tuple(t for t in pytree.tree_leaves(result) if isinstance(t, Tensor))

    tensors = [t.detach().contiguous() for t in tensors]
    try:
        level_1 = _trace(function, tensors)
    except CaptureError as error:
        counts.refuse(op.name, error.message)
        return
    values = {f"x{i}": t for i, t in enumerate(tensors)}
    names = [f"x{i}" for i in range(len(tensors))]
    try:
        compiled = compile_graph(
            snapshot.take(level_1), {"T": 1}, (RAISE, FUSE), num_threads=1, objects=objects
        )
    except REFUSALS as error:
        counts.refuse(op.name, f"{type(error).__name__}: {error.message}")
        return
    except AiosError as error:
        counts.failures.append(f"{op.name} {_shapes(sample)}: {error}")
        return
    try:
        wanted = {e.name for e in compiled.program.inputs}
        got = compiled({"T": 1}, **{n: v for n, v in values.items() if n in wanted})
    finally:
        compiled.runner.close()
    with torch.no_grad():
        eager = function(*tensors)
        oracle = function(*(t.double() if t.is_floating_point() else t for t in tensors))
    wrong = [v for v in compare(oracle, eager, got) if not v.holds]
    noise = second_opinion(level_1, values, oracle) if wrong else []
    wrong = [v for v in wrong if v.error > FACTOR * noise[v.output]]
    if wrong:
        counts.failures.append(f"{op.name} {_shapes(sample)} {names}: {wrong[0]}")
    else:
        counts.right[op.name] += 1


def _trace(function: Any, tensors: list[Tensor]) -> Any:
    """Trace a function of tensors. Raises CaptureError for what torch itself cannot trace."""

    def run(*given: Tensor) -> Any:
        return function(*given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    texts = [f"{NAMES[t.dtype]}[{', '.join(map(str, t.shape))}]" for t in tensors]
    parameters = [inspect.Parameter(f"x{i}", kind, annotation=x) for i, x in enumerate(texts)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    try:
        module = trace(run)
    except CaptureError:
        raise
    except Exception as error:  # whatever torch raises for data-dependent or complex operators
        raise CaptureError(f"cannot be traced: {type(error).__name__}") from error
    values = [n.meta.get("val") for n in module.root.graph.nodes if n.op == "call_function"]
    if any(isinstance(v, Tensor) and (v.is_complex() or v.dtype not in NAMES) for v in values):
        raise CaptureError("computes with a dtype that no kernel has")
    prepare(module)
    return module


def _shapes(sample: Any) -> str:
    def show(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return f"{NAMES.get(leaf.dtype)}{list(leaf.shape)}"
        return leaf

    return str(pytree.tree_map(show, sample))
