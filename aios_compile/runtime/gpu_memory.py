"""Who needs what of a GPU's memory: weights, arena, inputs, graphs; the rest becomes KV pages.

Everything is known before anything is allocated, so that a card that is too small is told so with
a table, and not by a failing allocation in the middle of a request. What the executor allocates is
exactly what stands here (a test holds them together); graphs and the driver are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.plane import PREFIX, planar_row_bytes
from aios_compile.codegen.program import Program, WeightEntry
from aios_compile.codegen.step_packet import LISTS
from aios_compile.codegen.step_results import StepResults
from aios_compile.errors import DeviceMemoryError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.runtime.staging import ALIGNMENT, FIRST_LIST, packet_words, place_inputs

GRAPH_BYTES = 64 << 10  # allowed for a node of a captured graph; an estimate, not measured yet
CONTEXT_BYTES = 512 << 20  # CUDA context, modules of kernels, torch's own; an estimate too
GUESSED = ("graphs", "driver")
DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "int16": 2, "float16": 2, "bfloat16": 2,
    "float64": 8, "int64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """`num_bytes` of the card for `name`; `detail` says how they come about."""

    name: str
    num_bytes: int
    detail: str = ""


@dataclass(frozen=True)
class CardPlan:
    """How a card's memory is used. total_bytes: of the card; budget_bytes: that may be used."""

    total_bytes: int
    budget_bytes: int
    needs: tuple[Need, ...]
    page_bytes: int
    num_pages: int
    page_tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def num_bytes(self) -> int:
        """Return all bytes that are used, KV pages included."""
        return sum(need.num_bytes for need in self.needs) + self.kv_bytes

    def table(self) -> str:
        """Return who needs what, a line each, in MB (10^6 bytes)."""
        tokens = (self.num_pages - 1) * self.page_tokens
        kv = Need(
            "KV cache", self.kv_bytes,
            f"{self.num_pages} pages of {self.page_bytes:,} bytes, {tokens:,} tokens",
        )  # fmt: skip
        rows = [*self.needs, kv, Need("together", self.num_bytes, "")]
        rows.append(Need("may be used", self.budget_bytes, f"of {self.total_bytes / 1e6:,.0f} MB"))
        return "\n".join(
            f"  {n.name:<12} {n.num_bytes / 1e6:>10,.1f} MB  {n.detail}".rstrip() for n in rows
        )


def needs(program: Program, limits: Limits, buckets: Sequence[int]) -> tuple[Need, ...]:
    """Return what everything but the KV pages needs. buckets: the token counts of the graphs."""
    weights = sum(aligned(weight_bytes(entry)) for entry in program.weights)
    lists = dict.fromkeys(LISTS, FIRST_LIST)
    inputs = place_inputs(program.inputs, limits, lists)[1] + 4 * packet_words(limits, lists)
    rows = limits.max_num_logit_rows
    results = rows * StepResults.of(program.outputs, program.sizes).row_bytes()
    nodes = max(program.num_launches, program.settings.get("separate_launches", 0))
    graphs = len(buckets) * nodes * GRAPH_BYTES
    largest = sorted(program.plan.buffers, key=lambda b: -b.bytes)[:3]
    told = ", ".join(f"{b.name} {b.bytes / 1e6:.1f}" for b in largest)
    # KV pools begin aligned, one a layer
    padding = sum(ALIGNMENT for _ in program.states)
    return (
        Need("weights", weights, f"{len(program.weights)} tensors"),
        Need(
            "arena", program.plan.arena_bytes + 4 * program.counters,
            f"activations and workspaces of {program.sizes['T']} tokens; largest: {told}",
        ),
        Need("inputs", inputs + results + padding, "a step's packet, inputs and results"),
        Need("graphs", graphs, f"{len(buckets)} graphs of {nodes} launches (guess)"),
        Need("driver", CONTEXT_BYTES, "context, kernels, torch (guess)"),
    )  # fmt: skip


def plan_card(
    program: Program,
    limits: Limits,
    buckets: Sequence[int],
    total: int,
    free: int,
    utilization: float,
    wanted_pages: int | None = None,
) -> CardPlan:
    """Share out a card of `total` bytes of which `free` are free: at most total * utilization.

    wanted_pages: KV pages that must fit; without it there are as many as fit, up to what all
    sequences can use, and at least those of one sequence of the longest length.
    Raises DeviceMemoryError with the table of who needs what when it does not fit.
    """
    every = needs(program, limits, buckets)
    page = max(1, sum(state_page_bytes(program)))
    budget = min(int(total * utilization), free)
    fitting = (budget - sum(need.num_bytes for need in every)) // page
    most = limits.max_num_seqs * limits.max_pages_per_sequence + 1
    least = limits.max_pages_per_sequence + 1
    pages = min(most, fitting) if wanted_pages is None else wanted_pages
    plan = CardPlan(total, budget, every, page, pages, limits.page_size)
    if fitting < (least if wanted_pages is None else wanted_pages):
        asked = least if wanted_pages is None else wanted_pages
        raise DeviceMemoryError(
            f"the model does not fit: gpu_memory_utilization={utilization} of "
            f"{total / 1e6:,.0f} MB with {free / 1e6:,.0f} MB free leaves room for "
            f"{max(0, fitting)} KV pages, expected at least {asked}\n"
            + CardPlan(total, budget, every, page, asked, limits.page_size).table(),
            advice="raise gpu_memory_utilization, lower max_model_len, max_num_batched_tokens, "
            "max_num_seqs or kv_cache_memory_bytes, or quantise",
        )
    return plan


def weight_bytes(entry: WeightEntry) -> int:
    """Return the bytes of a weight as it is packed."""
    if entry.packed.startswith(PREFIX):
        return entry.shape[0] * planar_row_bytes(entry.packed, entry.shape[1])
    return math.prod(entry.shape) * DTYPE_BYTES.get(entry.dtype, 4)


def compare(plan: CardPlan, before: int, after: int) -> tuple[str, bool]:
    """Return a line that holds what was taken beside the plan, and whether that was enough.

    before, after: free bytes of the card before the first allocation, and with all graphs captured.
    Of the plan, graphs and driver alone are guesses; the device's own context may be there before.
    """
    taken, planned = before - after, plan.num_bytes
    guesses = sum(need.num_bytes for need in plan.needs if need.name in GUESSED)
    line = (
        f"GPU memory taken: {taken / 1e6:,.1f} MB, planned {planned / 1e6:,.1f} MB, of which "
        f"{guesses / 1e6:,.1f} MB for graphs and driver (they took "
        f"{(taken - planned + guesses) / 1e6:,.1f} MB)"
    )
    return line, taken <= planned


def aligned(size: int) -> int:
    """Return the bytes that a buffer of `size` takes among others."""
    return -(-size // ALIGNMENT) * ALIGNMENT
