"""Run programs on the same samples and measure one against another; the samples are chosen here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_compile.ir import evaluate, inputs, random_weights, sample_op
from aios_compile.ir.inputs import Step
from aios_compile.ir.module import IRModule, Recipe, outputs
from aios_compile.ir.ops import wide
from aios_compile.ir.quantized import LARGEST_CODE
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.passes import long_context
from aios_compile.passes.sample_tokens import RESULTS as SAMPLED

TOKENS = (1, 5, 19)
SECOND = 9  # tokens of a second prompt, where batches are proven to keep sequences apart
LONGEST = 120  # tokens of a sequence with a past: behind 64, not at the border of a page
FLOOR_ROUNDINGS = 8.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Measure on one thread: repeatable sums, and no barriers for tensors of a few rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Samples:
    """What programs are measured on. prompt: token ids instead of random ones. whole: every layer
    computes, on weights as they are given, with every row of the vocabulary.
    """

    tokens: tuple[int, ...] = TOKENS
    prompt: tuple[int, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Row:
    """One output at one T: relative error of the program after, and its budget."""

    where: str
    error: float
    budget: float

    @property
    def ratio(self) -> float:
        if self.error == 0:
            return 0.0
        return self.error / self.budget if self.budget > 0 else math.inf


@dataclass(frozen=True)
class Run:
    """Outputs and next states of a program, rows of several steps joined; the token of each row.

    axes: the dimension of an output that counts rows, where it is not the first.
    """

    outputs: dict[str, Tensor]
    states: dict[str, Tensor]
    rows: list[int] | None
    axes: dict[str, int]


def rows_between(
    oracle: Run, eager: Run, result: Run, where: str, factor: float, storage: float
) -> list[Row]:
    """Return a row for each output of `oracle`, and for each state that the runs share."""
    rows = []
    for name in oracle.outputs:
        if name not in result.outputs:
            rows.append(Row(f"{name} {where} (not returned)", math.inf, 0.0))
            continue
        o, b, a = _same_rows(name, oracle, eager, result)
        rows.append(_row(f"{name} {where}", o, b, a, factor, storage))
    for name in oracle.states:
        if name in result.states and result.states[name].shape == oracle.states[name].shape:
            o, b, a = (run.states[name][1:] for run in (oracle, eager, result))  # 0 is trash
            rows.append(_row(f"{name} {where}", o, b, a, factor, storage))
    return rows


def choose_steps(
    before: IRModule, after: IRModule, num_tokens: int, alone: bool = False
) -> tuple[list[Step], list[Step]]:
    """Choose the batches: whole sequences until the program is paged, mixed batches afterwards.

    Where tokens mix outside attention, a step is one whole sequence for ever. alone: a pass that
    pages is measured on this one prompt, without a second and longer ones.
    """
    if after.not_generatable:  # known from the end of the first stage on
        return [inputs.whole(num_tokens)], [inputs.whole(num_tokens)]
    paged = ["slots" in m.inputs.values() for m in (before, after)]
    if all(paged) and state_shapes(before) == state_shapes(after):
        mixed = inputs.mixed(num_tokens, _longest(after))
        return [mixed], [mixed]
    prompts: tuple[int, ...] = (num_tokens,)
    if paged == [False, True] and num_tokens > 2 * SECOND and not alone:
        long = min(long_context.BEHIND_64, _longest(after))
        affordable = long > num_tokens and long_context.affords(before, long + SECOND)
        prompts = (long if affordable else num_tokens, SECOND)
    steps = [inputs.chunks(*prompts) if p else inputs.each_whole(*prompts) for p in paged]
    return steps[0], steps[1]


def _longest(module: IRModule) -> int:
    """Return how many tokens a sequence of a sample may have: its page table and model end."""
    values = inputs.describe(module)
    tables = next(v.shape[1] for v in values if v.source == "page_tables")
    assert isinstance(tables, int)
    longest = min(inputs.page_size_of(values) * min(tables, inputs.MAX_PAGES // 2), LONGEST)
    limit = module.length_limit
    return longest if limit is None else min(longest, limit.num_tokens)


def state_shapes(module: IRModule) -> dict[str, str]:
    return {
        n.name: str(n.meta["val"].shape)
        for n in module.root.graph.nodes
        if n.op == "placeholder" and n.name in module.states
    }


def run_steps(
    module: IRModule,
    steps: Sequence[Step],
    weights: RandomWeights,
    skips: evaluate.Skips,
    seed: int,
    *,
    computed_in: torch.dtype | None = None,
    sampled: bool = False,
    prompt: Sequence[int] = (),
    watch: evaluate.Observe | None = None,
    rounds_kv: bool = False,
    rounds_activations: bool = False,
) -> Run:
    """Run a program over its steps, states going from one to the next.

    computed_in: the dtype of all floating-point values; None leaves the program's own. sampled: add
    what the sampler's reference makes of the logits, as sample_tokens should. prompt: token ids
    instead of random ones. watch: is told the value of every node. rounds_kv: caches of codes hold
    codes, see _first_state. rounds_activations: where a pass meant it, as the kernels do; otherwise
    they are exact (ir/evaluate.py).
    """
    values = inputs.describe(module)
    used = _weights_in_use(module, skips)
    fixed = {
        v.name: _weight(weights, module.weights[v.name], computed_in) if v.name in used else _UNUSED
        for v in values
        if v.kind == "weight"
    }
    vocabulary = random_weights.VOCABULARY_ROWS if weights.vocabulary else _table_rows(weights)
    states = {}
    for v in values:
        if v.kind == "state":
            live = v.name in used
            first = _first_state(v, steps, seed, computed_in, rounds_kv) if live else _UNUSED
            states[v.name] = first
    found: list[dict[str, Tensor]] = []
    rows: list[int] = []
    for step in steps:
        runtime = inputs.runtime_inputs(values, step, seed, vocabulary=vocabulary, prompt=prompt)
        given = {**fixed, **states, **_free_values(values, runtime, step, seed)}
        if computed_in is not None:
            given = {n: _cast(t, computed_in) for n, t in given.items()}
        results, states = evaluate.run(
            module,
            given,
            computed_in=computed_in,
            skips=skips,
            widened=None if rounds_activations else weights.widened,
            watch=watch,
        )
        found.append({n: r for n, r in results.items() if isinstance(r, Tensor)})
        if sampled:
            every = inputs.every_input(values, step, seed, vocabulary=vocabulary, prompt=prompt)
            found[-1] |= _sampled(module, results, step, every, computed_in)
        picked = step.rows if "logit_rows" in module.inputs.values() else range(step.num_tokens)
        rows += [step.places[r] for r in picked]
    axes = _row_axes(module)
    joined = {
        n: torch.cat([f[n] for f in found], axes.get(n, 0)) if len(found) > 1 else t
        for n, t in found[0].items()
    }
    return Run(joined, {n: s for n, s in states.items() if n in used}, rows, axes)


def _row_axes(module: IRModule) -> dict[str, int]:
    """Return the first dimension of a runtime size of each output that has one."""
    found = {}
    for name, node in zip(module.outputs, outputs(module.root.graph)):
        shape = getattr(node.meta.get("val"), "shape", ())
        runtime = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        found.update({name: runtime[0]} if runtime else {})
    return found


def _sampled(
    module: IRModule,
    results: Mapping[str, Tensor],
    step: Step,
    runtime: Mapping[str, Tensor],
    computed_in: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the sampler's results by name, from the logits that a program returned."""
    logits = results[module.outputs[0]]
    logits = logits.reshape(-1, logits.shape[-1])
    if "logit_rows" not in module.inputs.values():
        logits = logits[list(step.rows)]
    given = [logits.to(wide(logits.dtype)), *(runtime[name] for name in sample_op.INPUTS)]
    if computed_in is not None:
        given = [_cast(t, computed_in) for t in given]
    return dict(zip(SAMPLED, sample_op.reference(*given)))


_UNUSED = torch.empty(0)


def _weights_in_use(module: IRModule, skips: evaluate.Skips) -> set[str]:
    """Return the weights that something other than a passed-through layer reads."""
    return {
        n.name
        for n in module.root.graph.nodes
        if n.op == "placeholder" and any(u.name not in skips for u in n.users)
    }


def _table_rows(weights: RandomWeights) -> int:
    """Return a bound for token ids. It is the checkpoint's, not the program's: merging weights must
    not change the samples."""
    return min((shape[0] for shape in weights.shapes.values() if len(shape) == 2), default=2)


def _weight(weights: RandomWeights, recipe: Recipe, dtype: torch.dtype | None) -> Tensor:
    value = weights.weight(recipe, dtype is torch.float64)
    return value if dtype is None else _cast(value, dtype)


def _first_state(
    value: inputs.Value,
    steps: Sequence[Step],
    seed: int,
    dtype: torch.dtype | None,
    rounds_kv: bool,
) -> Tensor:
    """Return a cache: random where batches have a past, zeros where the sequence starts here.

    A cache of half precision or of codes is held in float32 while measuring: how keys are stored is
    an option of the user, and its rounding would hide what the pass does. rounds_kv: codes stay.
    """
    shape = [inputs.size(s, {}) for s in value.shape]
    past = any(not step.prompts for step in steps)
    tensor = inputs.random_state(value.name, shape, value.dtype, seed)
    tensor = tensor if past else torch.zeros_like(tensor)
    codes = value.dtype in LARGEST_CODE
    if codes and rounds_kv:
        return tensor
    return tensor.to(dtype or (torch.float32 if codes else wide(value.dtype)))


def _free_values(
    values: Sequence[inputs.Value], runtime: Mapping[str, Tensor], step: Step, seed: int
) -> dict[str, Tensor]:
    """Return the runtime inputs by placeholder name, and random values for unknown ones."""
    found = {}
    for v in values:
        if v.kind == "input" and v.source in runtime:
            found[v.name] = runtime[v.source]
        elif v.kind in ("input", "free"):
            found[v.name] = _free_value(v, step, seed)
    return found


def _free_value(value: inputs.Value, step: Step, seed: int) -> Tensor:
    """Return random values of about 1; a chunk gets its tokens of the whole sequence's values."""
    sizes = inputs.sizes_of(step)
    chunk = bool(step.prompts) and "T" in value.shape
    if chunk:
        sizes["T"] = sum(step.prompts)
    shape = [inputs.size(s, sizes) for s in value.shape]
    scale = 20 if value.dtype.is_floating_point and len(shape) > 1 else 1
    tensor = inputs.random_tensor(value.name, shape, value.dtype, seed) * scale
    if not chunk:
        return tensor
    return tensor.index_select(value.shape.index("T"), torch.tensor(step.places))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _same_rows(name: str, oracle: Run, native: Run, result: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of an output in the three runs, at the tokens that all of them have."""
    o, b, a = oracle.outputs[name], native.outputs[name], result.outputs[name]
    if oracle.rows == result.rows or o.dim() == 0 or oracle.rows is None or result.rows is None:
        return o, b, a
    axis = oracle.axes.get(name, 0)
    if o.shape[axis] != len(oracle.rows) or a.shape[axis] != len(result.rows):
        return o, b, a
    common = [r for r in result.rows if r in oracle.rows]
    index = torch.tensor([oracle.rows.index(r) for r in common])
    of_result = torch.tensor([result.rows.index(r) for r in common])
    return o.index_select(axis, index), b.index_select(axis, index), a.index_select(axis, of_result)


def _row(where: str, o: Tensor, b: Tensor, a: Tensor, factor: float, storage: float) -> Row:
    """Measure one output: `a` and `b` against the oracle `o`."""
    if a.shape != o.shape:
        return Row(f"{where} (shape {tuple(a.shape)} for {tuple(o.shape)})", math.inf, 0.0)
    if not o.is_floating_point():
        wrong = ((a != o) & (b == o)).any()  # an integer that rounding decides may differ
        return Row(where, math.inf if wrong else 0.0, 0.0)
    finite = o[o.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    scale = scale or 1.0
    roundoff = torch.finfo(b.dtype).eps
    budget = factor * _distance(b, o) / scale + FLOOR_ROUNDINGS * roundoff + storage
    return Row(where, _distance(a, o) / scale, budget)


def _distance(value: Tensor, oracle: Tensor) -> float:
    """Return the largest difference: 0 for equal infinities, infinite for a lone NaN or inf."""
    value = value.to(torch.float64)
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    gap = (value - oracle).abs().masked_fill(same, 0.0)
    return float(torch.nan_to_num(gap, nan=math.inf, posinf=math.inf).max()) if gap.numel() else 0.0


def wider_dtype(before: IRModule, after: IRModule) -> torch.dtype | None:
    """Return the dtype of the results of `after` where it is wider than that of `before`.

    A pass that widens is held against the program before computed in the wider dtype: the error of
    half precision would excuse anything.
    """
    narrow, given = (outputs(m.root.graph)[0].meta["val"].dtype for m in (before, after))
    both_float = narrow.is_floating_point and given.is_floating_point
    return given if both_float and torch.finfo(given).eps < torch.finfo(narrow).eps else None


def storage_roundoff(module: IRModule) -> float:
    """Return the coarsest rounding among what a program stores: its states and weights.

    Codes of a KV cache do not count: they are measured unrounded, and then on their own.
    """
    held = [v.dtype for v in inputs.describe(module) if v.kind in ("state", "weight")]
    floats = [d for d in held if d.is_floating_point and d not in LARGEST_CODE]
    return max((torch.finfo(d).eps for d in floats), default=0.0)
