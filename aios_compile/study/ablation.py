"""What each optional pass is worth: launches, bytes moved a token and nodes with the pass left out.

Counted from level 3, nothing is run or timed; bytes as in study/traffic.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from aios_compile.errors import AiosError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.study.traffic import call_costs


@dataclass(frozen=True)
class Cost:
    """Counts of one level-3 program. launches_a_layer: of the first region; launches: of a step."""

    launches_a_layer: int
    launches: int
    bytes_a_token: int
    nodes: int


@dataclass(frozen=True)
class Ablation:
    """The program with everything, and without each optional pass (a text: why it cannot be)."""

    everything: Cost
    without: dict[str, Cost | str]

    def __str__(self) -> str:
        head = f"{'without':<34}{'launches a layer':>17}{'in all':>8}{'MB a token':>12}{'nodes':>7}"
        lines = [head, "-" * len(head), _line("(all passes)", self.everything, self.everything)]
        lines += [_line(name, cost, self.everything) for name, cost in self.without.items()]
        return "\n".join(lines)

    def idle(self) -> tuple[str, ...]:
        """Return the passes that change none of the counts here."""
        return tuple(name for name, cost in self.without.items() if cost == self.everything)


def _line(name: str, cost: Cost | str, base: Cost) -> str:
    if isinstance(cost, str):
        return f"{name:<34}  {cost}"[:100]
    launches = f"{cost.launches_a_layer:>17}{cost.launches:>8}"
    same = "  no change" if cost == base and name != "(all passes)" else ""
    return f"{name:<34}{launches}{cost.bytes_a_token / 1e6:>12.3f}{cost.nodes:>7}{same}"


def ablate(
    captured: IRModule,
    stages: Sequence[Stage],
    options: PassOptions,
    *,
    context: int = 256,
    only: Collection[str] | None = None,
) -> Ablation:
    """Run the pipeline once whole, and from each optional pass on once more without it.

    only: the passes to leave out; None for every optional one.
    """

    module = snapshot.take(captured)
    saved = []
    for i, stage in enumerate(stages):
        for j, function in enumerate(stage.passes):
            info = info_of(function)
            wanted = only is None or info.name in only
            if wanted and not info.required and info.runs_on(options.target):
                rest = (replace(stage, passes=stage.passes[j + 1 :]), *stages[i + 1 :])
                saved.append((info.name, snapshot.take(module), rest))
            one = Stage(module.level, (function,))
            run_pipeline(module, [one], options, verify=0)
        run_pipeline(module, [Stage(stage.level_after, (), stage.analysis)], options, verify=0)
    everything = cost_of(module, context)
    without: dict[str, Cost | str] = {}
    for name, before, rest in saved:
        try:
            run_pipeline(before, rest, options, verify=0)
            without[name] = cost_of(before, context)
        except AiosError as error:
            without[name] = f"needed: {error.message}"
    return Ablation(everything, without)


def cost_of(module: IRModule, context: int = 256) -> Cost:
    """Count a level-3 program; `context` tokens are in the cache."""
    costs = call_costs(module, context)
    regions = [c.region for c in costs if c.region]
    per_layer = regions.count(regions[0]) if regions else 0
    launches = sum(c.times for c in costs)
    moved = sum(c.times * c.traffic.total for c in costs)
    return Cost(per_layer, launches, moved, snapshot.count_nodes(module))
