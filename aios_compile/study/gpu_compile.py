"""Compile a model's Triton kernels for a GPU that is not here, and say what they are made of.

    for report in compile_for("Qwen3-0.6B", "cuda:90", Path("out"), {}): ...

No weight is read. `out` gets the source, PTX and binary of every kernel and variant; gpu_pages.py
makes them readable. Predictions are the roofline of a decode step of one sequence and nothing more:
bytes over the card's bandwidth, plus what a launch costs in a graph.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton

from aios_compile.codegen.program import Program
from aios_compile.codegen.triton.cards import LATENCY_US, LAUNCH_US, Card, card_of
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.compile_ahead import CACHE, Binary, compile_ahead
from aios_compile.codegen.triton.kernel_ledger import FOLDER, MEASURED, of_card
from aios_compile.codegen.triton.occupancy import Occupancy, occupancy
from aios_compile.compiler import launched_sources
from aios_compile.config import CompileOptions
from aios_compile.errors import DeviceMemoryError
from aios_compile.ir.module import body_of
from aios_compile.kernel_tuning import tuning_for
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.gpu_executor import token_buckets
from aios_compile.runtime.gpu_memory import plan_card
from aios_compile.study.kernel_table import KernelRow, kernel_rows
from aios_compile.study.line_nodes import BodyNode, nodes_of_lines
from aios_compile.study.plan_model import Planned, open_without_weights, plan_model

CHOSEN = re.compile(r"^# chosen for (.*)$", re.MULTILINE)  # in the head of a linear's module
PHASE = re.compile(r"^#   phase \d+: ", re.MULTILINE)  # in the head of a persistent launch's
LineNodes = Mapping[int, tuple[BodyNode, ...]]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a decode step of one sequence (256 tokens in the cache).

    calls: in a step, all layers. launches: of its module in one call. bytes, floor_us,
    predicted_us: of one call. share: floor over prediction. binaries: all variants. held: programs
    that a multiprocessor holds of each launch for one token. chosen: why a linear's variants are
    what they are, a line each. nodes: what each line of the Triton source computes (line_nodes.py).
    """

    row: KernelRow
    calls: int
    launches: int
    bytes: int
    floor_us: float
    predicted_us: float
    binaries: tuple[Binary, ...]
    held: tuple[Occupancy, ...] = ()
    chosen: tuple[str, ...] = ()
    nodes: LineNodes = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.floor_us / self.predicted_us

    def decode_binaries(self) -> list[Binary]:
        """Return the binaries that run for one token: those of the first variant."""
        return [b for b in self.binaries if b.most == self.binaries[0].most]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        numbers = ("calls", "launches", "bytes", "floor_us", "predicted_us", "share")
        values = {name: getattr(self, name) for name in numbers}
        lines = list(self.row.model_lines)
        values |= {"chosen": list(self.chosen), "held": [asdict(h) for h in self.held]}
        binaries = [asdict(b) for b in self.binaries]
        return {"name": self.row.name, **values, "model_lines": lines, "binaries": binaries}


@dataclass(frozen=True)
class StepReport:
    """All kernels for a card, the one with the longest time in a step first.

    floor_us: every weight and KV entry once, over the bandwidth. memory: the plan of the card, or
    why the model does not fit. ledger: which measurements of a GPU were used, a line each.
    """

    target: str
    card: str
    kernels: tuple[KernelReport, ...]
    floor_us: float
    memory: str = ""
    ledger: tuple[str, ...] = ()

    @property
    def predicted_us(self) -> float:
        return sum(k.predicted_us * k.calls for k in self.kernels)

    @property
    def launches(self) -> int:
        return sum(k.launches * k.calls for k in self.kernels)


def plan_for(
    model: str | Path, target: str, keywords: Mapping[str, Any], tuning: Any = None
) -> Planned:
    """Capture and plan a model for a card; no GPU and no weights are needed.

    tuning: codegen.triton.choice.Tuning, if not that of the options. Raises CodegenError for a card
    that is not known.
    """
    card_of(target)
    options = CompileOptions.parse({**keywords, "device": "cuda"})
    return plan_model(open_without_weights(model, options), options, card=target, tuning=tuning)


def compile_for(
    model: str | Path, target: str, out: Path, keywords: Mapping[str, Any], jobs: int = 2
) -> StepReport:
    """Compile every kernel of a model for a target into `out`; return what they use and cost.

    Raises CodegenError naming kernel and target when one does not compile for it.
    """
    card = card_of(target)
    options = CompileOptions.parse({**keywords, "device": "cuda"})
    tuning, told = shipped_tuning(options, card)
    planned = plan_for(model, target, keywords, tuning)
    sources = launched_sources(planned.program, planned.emitted)
    binaries = compile_ahead(sources, target, out, jobs)
    shutil.rmtree(out / CACHE, ignore_errors=True)
    by_symbol = {s.symbol: tuple(b) for s, b in zip(sources, binaries)}
    rows = kernel_rows(planned.module, planned.emitted, planned.program)
    launched, every = [row for row in rows if row.symbol in by_symbol], planned.emitted.sources
    nodes = {
        every[i].symbol: nodes_of_lines(every[i].text, body_of(call))
        for call, i in planned.emitted.by_call.items()
        if every[i].symbol in by_symbol
    }
    texts = {s.symbol: s.text for s in sources}
    reports = []
    for row in launched:
        text = texts[row.symbol]
        phases = max(1, len(PHASE.findall(text)))
        report = report_of(row, by_symbol[row.symbol], card, nodes.get(row.symbol, {}), phases)
        reports.append(replace(report, chosen=tuple(CHOSEN.findall(text))))
    reports.sort(key=lambda report: -report.predicted_us * report.calls)
    memory = memory_table(planned.program, card, options.gpu_memory_utilization)
    ledger = (told, *measured_lines(reports))
    return StepReport(target, card.name, tuple(reports), floor_us(rows, card), memory, ledger)


def shipped_tuning(
    options: CompileOptions, card: Card, folder: Path = FOLDER
) -> tuple[Tuning | None, str]:
    """Return whom to ask about the configurations for a card, its shipped ledger too, and a line
    that says what the ledger is.
    """
    tuning = tuning_for(options, card.target)
    if options.joined_launches():
        return tuning, "the ledger of kernels is not used: phases of one launch share their warps"
    ledger, line = of_card(card.target, card.name, triton.__version__, folder)
    if ledger is not None:
        tuning = replace(tuning or Tuning(), ledger=ledger)
    return tuning, line


def measured_lines(reports: Sequence[KernelReport]) -> list[str]:
    """Return a line for each variant that the ledger decided."""
    return [f"{r.row.name}: {line}" for r in reports for line in r.chosen if MEASURED in line]


def memory_table(program: Program, card: Card, utilization: float) -> str:
    """Return who needs what of a card that runs nothing else, or the error that says so."""
    settings, sizes = program.settings, program.sizes
    limits = Limits(
        max_num_batched_tokens=sizes["T"], max_num_seqs=sizes["S"], max_num_logit_rows=sizes["R"],
        max_pages_per_sequence=settings["max_pages_per_sequence"], num_pages=2,
        page_size=settings["page_size"], max_model_len=settings["max_model_len"],
        vocab_size=settings["vocab_size"],
    )  # fmt: skip
    buckets, total = token_buckets(sizes["T"]), card.memory_bytes
    try:
        return plan_card(program, limits, buckets, total, total, utilization).table()
    except DeviceMemoryError as error:
        return str(error)


def report_of(
    row: KernelRow,
    binaries: tuple[Binary, ...],
    card: Card,
    nodes: LineNodes | None = None,
    num_phases: int = 1,
) -> KernelReport:
    """Predict one call of a kernel: its bytes over the bandwidth, its launches, one latency;
    between the phases of a persistent launch a flag's way to memory and back.
    """
    launches = sum(b.most == binaries[0].most for b in binaries)
    size = row.bytes_a_token // max(1, row.launches)
    floor = size / card.bytes_per_us
    predicted = floor + launches * LAUNCH_US + (2 * num_phases - 1) * LATENCY_US
    held = tuple(occupancy(b.usage(), card) for b in binaries[:launches])
    return KernelReport(
        row, row.launches, launches, size, floor, predicted, binaries, held, nodes=nodes or {}
    )


def floor_us(rows: list[KernelRow], card: Card) -> float:
    """Return the least time of a step: every weight and KV entry once."""
    return sum(row.weight_bytes + row.kv_bytes for row in rows) / card.bytes_per_us
