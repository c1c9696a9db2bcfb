"""The numerical proof of one pass: the program before and after it against an fp64 oracle.

What runs: the whole program at a few small T, with one call of each region executed and the others
passed through (their hidden state goes on unchanged); a call that is bound otherwise than its like
runs as well, so that weights bound to the wrong layer show (sampled_layers.py). Tables of
vocabulary rows shrink to 64 rows, epsilons are enlarged (small_constants.py). The oracle is the
program *before* the pass in float64, on the same inputs and on weights that its own recipes make of
the same random checkpoint. The budget of the program after is c times the error of the program
before in its own precision (in the wider one, after a pass that widens), plus a floor of a few
roundings; c belongs to the numerics tier, never to a pass. Passes in a row share one program before
(see _Chain).

A pass that quantises weights is proven on dequantised weights: the program before gets the values
that the recipes of the program after make, activations are exact, and what is left to differ is
rounding. How much quantisation changes is no property of the rewrite: the loader measures it.
A pass that stores the KV cache in codes is proven on codes that are not rounded; with real ones it
is held against the program before with keys and values half a step off (kv_rounding.py), and that
error is the one that is shown.

A pass that pages the KV cache is proven by running the program after it in two chunks over permuted
pages, together with a second prompt, against one whole sequence at a time; from then on the samples
are mixed batches over filled caches. Windows and chunks that the samples would not reach are made
small in both programs, or the samples longer (long_context.py); bounds that only the program after
has are made small in it (unreached_bounds.py). Outputs that only the program after
has (what was sampled) are compared with the op's reference on the logits of the program before.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aios_compile.ir import evaluate, inputs, random_weights, snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.passes import (
    kv_rounding,
    long_context,
    measure,
    sampled_layers,
    small_constants,
    unreached_bounds,
)
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.long_context import Smaller
from aios_compile.passes.measure import (
    TOKENS,
    Row,
    Run,
    Samples,
    choose_steps,
    one_thread,
    rows_between,
    run_steps,
    state_shapes,
    storage_roundoff,
    wider_dtype,
)
from aios_compile.passes.sample_tokens import RESULTS as SAMPLED
from aios_compile.passes.sampled_layers import choose_skips

# The largest errors of two correct programs in the same precision differ by less than this.
FACTORS = {"exact": 4.0, "reassociates": 8.0, "lossy": 16.0}


@dataclass(frozen=True)
class Certificate:
    """What was measured. Errors are relative to the largest value of the output they belong to.

    where: the output and T that came closest to its budget. holds: every output kept its budget.
    """

    max_error: float
    error_budget: float
    holds: bool
    where: str
    seed: int
    tokens: tuple[int, ...] = TOKENS
    cached: bool = False


@dataclass(frozen=True)
class CertificateCache:
    """Certificates on disk, one JSON file a content hash; what cannot be read is measured anew."""

    folder: Path

    def get(self, key: str) -> Certificate | None:
        try:
            row = json.loads((self.folder / f"{key}.json").read_text())
            row["tokens"] = tuple(row["tokens"])
            return Certificate(**{**row, "cached": True})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, key: str, certificate: Certificate) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = self.folder / f".{key}.{os.getpid()}"
        aside.write_text(json.dumps(asdict(certificate)))
        os.replace(aside, self.folder / f"{key}.json")


@dataclass
class _Chain:
    """Passes in a row that are held against the same program, the one before the first of them.

    One oracle and one error of eager serve them all, so that many small errors cannot add up: a
    later pass does not inherit a larger budget from the errors of earlier ones. A chain ends when a
    pass changes the meaning (lossy) or what can be compared (batches, outputs, states).
    """

    start: IRModule
    text: str
    factor: float = 0.0
    smaller: Smaller = field(default_factory=Smaller)
    factor_of_epsilons: float = 1.0
    tokens: tuple[int, ...] = TOKENS
    sampled: bool = False  # whether `eager` holds what the sampler would return
    whole: bool = False  # Samples.whole: nothing is made smaller
    computed_in: torch.dtype | None = None  # what `eager` was computed in, None as it is
    vocabulary: int = 0  # of the weights that `eager` ran on
    eager: dict[tuple[object, ...], tuple[Run, Run]] = field(default_factory=dict)

    @staticmethod
    def begin(module: IRModule, after: IRModule, samples: Samples, with_text: bool) -> _Chain:
        """Start a chain at a program: large windows are made small, epsilons large."""
        text = snapshot.module_text(module) if with_text else ""
        if samples.whole:
            return _Chain(snapshot.take(module), text, tokens=samples.tokens, whole=True)
        tokens = long_context.samples(module, samples.tokens)
        raised = long_context.unseen(module, after, tokens[-1])
        smaller = long_context.smaller_bounds(module, raised)
        start = long_context.shrunk(snapshot.take(module), smaller)
        factor = small_constants.factor_of(start)
        return _Chain(start, text, smaller=smaller, factor_of_epsilons=factor, tokens=tokens)

    def fits(self, before: IRModule, after: IRModule) -> bool:
        """Return whether two programs can be compared with the start of the chain.

        They cannot where attention has become an op since, with a window that no sample passes.
        """
        same_outputs = set(self.start.outputs) == set(before.outputs)
        windows = {w for m in (before, after) for w in long_context.bounds(m)}
        unseen = {w for w in windows if w > long_context.SEEN} - self.smaller.bounds.keys()
        reached = all(window < self.tokens[-1] for window in unseen)
        return (
            same_outputs
            and (reached or self.whole)
            and state_shapes(self.start) == state_shapes(before)
        )


class Certifier:
    """Measures the passes over one program, in order, each after the last one that was kept."""

    def __init__(
        self,
        module: IRModule,
        options: PassOptions,
        seed: int,
        cache: CertificateCache | None,
        samples: Samples = Samples(),  # noqa: B008 - frozen
        weights: RandomWeights | None = None,
    ) -> None:
        self.options, self.seed, self.cache, self.samples = options, seed, cache, samples
        self._weights = {0: weights or RandomWeights.of(module, seed)}
        self._chain: _Chain | None = None

    def measure(self, before: IRModule, after: IRModule, function: PassFunction) -> Certificate:
        """Compare a program before and after a pass, or find the certificate of the same."""
        tier = info_of(function).numerics
        if self._chain is None or not self._chain.fits(before, after) or tier == "lossy":
            self._chain = _Chain.begin(before, after, self.samples, self.cache is not None)
        chain = self._chain
        factor = max(chain.factor, FACTORS[tier])
        key = self._key(chain, factor, before, after, function) if self.cache is not None else ""
        certificate = self.cache.get(key) if self.cache is not None else None
        if certificate is None:
            certificate = self._measured(chain, after, factor, tier == "lossy")
            if self.cache is not None and certificate.holds:
                self.cache.put(key, certificate)
        if certificate.holds:
            chain.factor = factor
            self._chain = None if tier == "lossy" else chain
        return certificate

    def _measured(self, chain: _Chain, after: IRModule, factor: float, lossy: bool) -> Certificate:
        vocabulary = 0
        if not chain.whole:
            vocabulary = random_weights.shrinkable_vocabulary(chain.start, after)
        weights = self._weights.get(vocabulary)
        if weights is None:
            whole = self._weights[0]
            weights = replace(whole, vocabulary=vocabulary, _buffers={}, _built={}, _wide={})
            self._weights[vocabulary] = weights
        sampled = set(SAMPLED) <= set(after.outputs) - set(chain.start.outputs)
        samples = vocabulary, sampled, wider_dtype(chain.start, after)
        if samples != (chain.vocabulary, chain.sampled, chain.computed_in):
            chain.vocabulary, chain.sampled, chain.computed_in = samples
            chain.eager.clear()
        weights.learn(after)
        quantized = random_weights.quantized_recipes(chain.start, after) if lossy else {}
        if quantized:  # the same rounded weights on both sides: no budget for them
            weights = replace(weights, quantized=quantized, _buffers={}, _built={}, _wide={})
        storage = storage_roundoff(after)
        if not lossy or storage <= storage_roundoff(chain.start):
            storage = 0.0  # nothing is stored in less precision than before
        after = long_context.shrunk(after, chain.smaller)
        after = after if chain.whole else unreached_bounds.reached(after, chain.start)
        rows: list[Row] = []
        rounded: list[Row] = []
        epsilons = chain.factor_of_epsilons
        with (
            one_thread(),
            small_constants.enlarged(chain.start, epsilons),
            small_constants.enlarged(after, epsilons),
        ):
            for index in range(len(chain.tokens)):
                rows += self._compare(chain, after, weights, index, factor, storage)
                codes = kv_rounding.rounded_dtype(chain.start, after) if lossy else None
                if codes is not None:
                    rounded += self._compare_rounded(chain, after, weights, index, codes)
                weights.forget()
        worst = max(rows, key=lambda r: r.ratio, default=Row("nothing to compare", 0.0, 0.0))
        if worst.ratio <= 1 and rounded:
            worst = max(rounded, key=lambda r: r.ratio)
        holds = worst.ratio <= 1
        return Certificate(worst.error, worst.budget, holds, worst.where, self.seed, chain.tokens)

    def _compare(
        self,
        chain: _Chain,
        after: IRModule,
        weights: RandomWeights,
        index: int,
        factor: float,
        storage: float,
    ) -> list[Row]:
        """Run oracle, eager and `after` at T = tokens[index]; return a row a shared output."""
        start, num_tokens = chain.start, chain.tokens[index]
        steps, after_steps = choose_steps(start, after, num_tokens, chain.whole)
        skips, after_skips = ({}, {}) if chain.whole else choose_skips(start, after, index)
        run = functools.partial(run_steps, weights=weights, seed=self.seed)
        prompt = self.samples.prompt
        which = *steps, frozenset(skips)
        if which not in chain.eager:
            sample = functools.partial(
                run, start, steps, skips=skips, sampled=chain.sampled, prompt=prompt
            )
            oracle = sample(computed_in=torch.float64)
            chain.eager[which] = oracle, sample(computed_in=chain.computed_in)
        oracle, eager = chain.eager[which]
        result = run(after, after_steps, skips=after_skips, prompt=prompt)
        return rows_between(oracle, eager, result, f"at T={num_tokens}", factor, storage)

    def _compare_rounded(
        self,
        chain: _Chain,
        after: IRModule,
        weights: RandomWeights,
        index: int,
        codes: torch.dtype,
    ) -> list[Row]:
        """Run `after` with codes that are rounded; return a row a shared output."""
        start, num_tokens = chain.start, chain.tokens[index]
        steps, after_steps = choose_steps(start, after, num_tokens, chain.whole)
        skips, after_skips = ({}, {}) if chain.whole else choose_skips(start, after, index)
        run = functools.partial(
            run_steps, weights=weights, seed=self.seed, prompt=self.samples.prompt
        )
        off = kv_rounding.moved(start, codes)
        moved = run(off, steps, skips=skips, computed_in=chain.computed_in)
        result = run(after, after_steps, skips=after_skips, rounds_kv=True)
        where = f"with pages of codes at T={num_tokens}"
        oracle, _ = chain.eager[(*steps, frozenset(skips))]
        return rows_between(oracle, moved, result, where, FACTORS["exact"], 0.0)

    def _key(
        self,
        chain: _Chain,
        factor: float,
        before: IRModule,
        after: IRModule,
        function: PassFunction,
    ) -> str:
        """Hash all that a certificate depends on: programs, pass, measuring code, versions."""
        texts = [chain.text, snapshot.module_text(before), snapshot.module_text(after)]
        known = {n: t for n, t in after.tensors.items() if not isinstance(t, torch.nn.Parameter)}
        texts += [f"{n} {_digest(t)}" for n, t in sorted(known.items())]
        texts += [info_of(function).name, str(factor), _source(function), _measuring_code()]
        texts += [str(m.outputs) for m in (chain.start, before, after)]
        texts += [torch.__version__, str(self.seed), str(self.options)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _source(function: PassFunction) -> str:
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return repr(function)


@functools.lru_cache(maxsize=1)
def _measuring_code() -> str:
    modules: list[Any] = [
        measure,
        kv_rounding,
        long_context,
        evaluate,
        inputs,
        random_weights,
        sampled_layers,
        small_constants,
        snapshot,
        unreached_bounds,
    ]
    here = inspect.getsource(inspect.getmodule(_measuring_code) or Certifier)
    return here + "".join(inspect.getsource(m) for m in modules)


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    data = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
