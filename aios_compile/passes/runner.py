"""Run the passes in order and prove each one: count, clean, verify, revert, report.

A pass only rewrites. Everything around it happens here, the same for all: a snapshot, the rewrite
of every region and of the outer graph, dead code, structural checks, the certificate, the dump.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from aios_compile import env
from aios_compile.errors import ConfigError, PassError
from aios_compile.ir import snapshot, verifier
from aios_compile.ir.module import IRModule, Level, drop_dead
from aios_compile.passes.certificate import CertificateCache, Certifier
from aios_compile.passes.context import PassContext, PassOptions, Refusal
from aios_compile.passes.graph_pass import PassFunction, PassInfo, info_of
from aios_compile.passes.result import PassResult


@dataclass(frozen=True)
class Stage:
    """Consecutive passes, and the level that the program has reached when they are done.

    analysis: reads the program after them; it may set `not_generatable` or raise, nothing else.
    """

    level_after: Level
    passes: tuple[PassFunction, ...]
    analysis: Callable[[IRModule, Sequence[PassResult]], None] | None = None


class Dumper(Protocol):
    """Receives the program after every pass that changed it."""

    def level(self, name: str, module: IRModule) -> None: ...


class Progress(Protocol):
    """Is told how many passes are done."""

    def update(self, done: int, total: int | None = None) -> None: ...


@dataclass(frozen=True)
class _Hits:
    count: int
    refusals: tuple[Refusal, ...]


def run_pipeline(
    module: IRModule,
    stages: Sequence[Stage],
    options: PassOptions,
    *,
    disabled: Iterable[str] = (),
    verify: int = 1,
    seed: int = 0,
    dump: Dumper | None = None,
    progress: Progress | None = None,
    certificates: CertificateCache | None = None,
) -> list[PassResult]:
    """Rewrite `module` in place, stage by stage; return one result a pass, in order.

    disabled: names of optional passes to leave out, next to those of AIOS_DISABLE. verify: 0 skips
    the numerical certificates (the structural checks always run). AIOS_BISECT=n keeps the first n
    optional rewrites; the rewrites of one pass count together: one that would pass n is left out.
    Raises ConfigError for an unknown name, PassError when a required pass fails.
    """
    stages = [replace(s, passes=_for_target(s.passes, options.target)) for s in stages]
    left_out = _left_out(
        [p for s in stages for p in s.passes], (*disabled, *env.DISABLE.get_names())
    )
    bisect = env.BISECT.get_int(0, 10**9) if env.BISECT.get() else None
    certifier = Certifier(module, options, seed, certificates) if verify else None
    results: list[PassResult] = []
    saved: IRModule | None = None  # serves until a pass changes the program: copies cost
    total, optional_hits = sum(len(s.passes) for s in stages), 0
    for stage in stages:
        for function in stage.passes:
            info = info_of(function)
            remaining = None if bisect is None or info.required else bisect - optional_hits
            if info.name in left_out:
                result = _skipped(info, module, "disabled")
            else:
                saved = saved or snapshot.take(module)
                result = _run_pass(module, saved, function, options, certifier, remaining)
                if result.hits or not result.kept or result.op_deltas is not None:
                    saved = None
            if result.kept and not info.required:
                optional_hits += result.hits
            results.append(result)
            if dump is not None and result.kept and result.hits:
                dump.level(info.name, module)
            if progress is not None:
                progress.update(len(results), total)
        if stage.analysis is not None:
            stage.analysis(module, results)
        module.level = stage.level_after
        _check(module)
    return results


def _for_target(passes: Iterable[PassFunction], target: str) -> tuple[PassFunction, ...]:
    return tuple(p for p in passes if info_of(p).runs_on(target))


def _left_out(passes: Sequence[PassFunction], names: Iterable[str]) -> set[str]:
    """Check the names of disabled passes and return them."""
    known = {info_of(p).name: info_of(p) for p in passes}
    wanted = set(names)
    for name in sorted(wanted):
        if name not in known:
            optional = ", ".join(n for n, info in known.items() if not info.required)
            raise ConfigError(
                f"there is no pass {name!r} to disable",
                advice=f"the optional passes are {optional}",
            )
        if known[name].required:
            raise ConfigError(f"the pass {name!r} is required and cannot be disabled")
    return wanted


def _skipped(info: PassInfo, module: IRModule, reason: str) -> PassResult:
    nodes = snapshot.count_nodes(module)
    return PassResult(
        info.name, info.numerics, info.required, nodes=(nodes, nodes), kept=False, reason=reason
    )


def _run_pass(
    module: IRModule,
    saved: IRModule,
    function: PassFunction,
    options: PassOptions,
    certifier: Certifier | None,
    remaining: int | None,
) -> PassResult:
    """Run one pass; go back to `saved` or raise when it crashes, breaks the graph or its budget."""
    info, ops = info_of(function), snapshot.count_ops(module)
    started = time.perf_counter()
    num_nodes = sum(ops.values())
    result = PassResult(info.name, info.numerics, info.required, nodes=(num_nodes, num_nodes))
    try:
        hits = _rewrite(module, function, options)
        result = replace(
            result,
            hits=hits.count,
            refusals=tuple(dict.fromkeys(map(_refusal_text, hits.refusals))),
        )
        result = replace(result, milliseconds=1e3 * (time.perf_counter() - started))
        if not hits.count and snapshot.same(module, saved):
            return result  # what changed without being counted (layouts) is proven all the same
        if remaining is not None and hits.count > remaining:
            snapshot.restore(module, saved)
            return replace(result, kept=False, reason="left out by AIOS_BISECT")
        _check(module)
        if module.length_limit != saved.length_limit:
            raise PassError("it changed the limit of tokens, which is the model's")
    except Exception as error:  # noqa: BLE001 - any crash of a pass is reported under its name
        return _failed(module, saved, result, _error_text(error), error)
    after = snapshot.count_ops(module)
    changed = {k: after[k] - ops[k] for k in sorted({*ops, *after}) if after[k] != ops[k]}
    result = replace(result, nodes=(num_nodes, sum(after.values())), op_deltas=changed)
    return result if certifier is None else _certify(module, saved, function, certifier, result)


def _certify(
    module: IRModule,
    saved: IRModule,
    function: PassFunction,
    certifier: Certifier,
    result: PassResult,
) -> PassResult:
    started = time.perf_counter()
    try:
        certificate = certifier.measure(saved, module, function)
    except Exception as error:  # noqa: BLE001 - a graph that does not run is the pass's fault
        return _failed(module, saved, result, f"does not run: {_error_text(error)}", error)
    result = replace(
        result,
        max_error=certificate.max_error,
        error_budget=certificate.error_budget,
        seed=certificate.seed,
        cached=certificate.cached,
        verify_milliseconds=1e3 * (time.perf_counter() - started),
    )
    if certificate.holds:
        return result
    reason = (
        f"error {certificate.max_error:.2e} of {certificate.where} against fp64 exceeds the budget "
        f"{certificate.error_budget:.2e} (seed {certificate.seed})"
    )
    return _failed(module, saved, result, reason, None)


def _failed(
    module: IRModule, saved: IRModule, result: PassResult, reason: str, cause: Exception | None
) -> PassResult:
    """Revert an optional pass; a required one ends the compile."""
    snapshot.restore(module, saved)
    if result.required:
        line = cause.source_line if isinstance(cause, PassError) else None
        raise PassError(
            f"the required pass {result.name} failed: {reason}",
            source_line=line,
            advice=f"AIOS_DUMP=folder writes the program; the pass is passes/{result.name}.py",
        ) from cause
    nodes = (result.nodes[0], result.nodes[0])
    return replace(result, kept=False, reason=reason, nodes=nodes, op_deltas=None)


def _rewrite(module: IRModule, function: PassFunction, options: PassOptions) -> _Hits:
    """Apply a pass to every region, then to the outer graph, and clean up after it."""
    count, refusals = 0, []
    for name in list(module.graphs()):
        context = PassContext(module, name, options)
        hits = function(context.graph_module.graph, context)
        count += hits
        refusals += context.refusals
        if hits:
            drop_dead(module)
    return _Hits(count, tuple(refusals))


def _check(module: IRModule) -> None:
    for graph_module in module.graphs().values():
        graph_module.graph.lint()
    verifier.verify(module)


def _error_text(error: Exception) -> str:
    return error.message if isinstance(error, PassError) else f"{type(error).__name__}: {error}"


def _refusal_text(refusal: Refusal) -> str:
    return f"{refusal.reason} ({refusal.source_line})" if refusal.source_line else refusal.reason
