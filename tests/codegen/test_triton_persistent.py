"""Persistent launches as they are planned for a card: launches a layer, residency, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import join_launches, persistent
from aios_compile.codegen.triton.cards import LATENCY_US, LAUNCH_US, card_of
from aios_compile.codegen.triton.compile_ahead import Binary
from aios_compile.codegen.triton.module_parts import take_apart
from aios_compile.codegen.triton.occupancy import Usage, occupancy
from aios_compile.config import CompileOptions
from aios_compile.errors import CodegenError, ConfigError, EngineError
from aios_compile.runtime.gpu_executor import check_residency
from aios_compile.runtime.torch_device import InterpreterDevice
from aios_compile.study import gpu_compile
from aios_compile.study.kernel_table import kernel_rows
from aios_compile.study.plan_model import Planned
from tests.codegen.triton_models import QWEN3
from tests.codegen.triton_modules import load

# what triton 3.7 reports for this model's launch on sm_90 (tests/nightly/test_triton_persistent.py)
REPORT = {1: (241, 0, 39936), 16: (250, 0, 98304), 32: (255, 32, 131072)}


def reported(sources: Any, target: str, folder: Path, jobs: int) -> list[list[Binary]]:
    """Stand for the compiler: REPORT, and a launch for more tokens than phases serve."""
    rows = [
        Binary(f"joined_{most}", most, {}, 4, registers, spills, shared, "", "")
        for most, (registers, spills, shared) in REPORT.items()
    ]
    return [[*rows, Binary("apart", None, {}, 8, 255, 0, 1 << 17, "", "")]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    options = {"max_model_len": 4096, "persistent_decode": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join_launches, "compile_ahead", reported)
        return gpu_compile.plan_for(folder, "cuda:90", options)


def joined(planned: Planned) -> KernelSource:
    return planned.emitted.sources[planned.emitted.joined["layer"]]


def test_a_layer_is_one_launch_where_it_fits_the_card(planned: Planned) -> None:
    """A variant that spills keeps its kernels' launches, as many tokens do."""
    layers = QWEN3["num_hidden_layers"]
    (item,) = planned.program.function("layer").items
    module = load(joined(planned))
    launches = {v["most"]: len(v["launches"]) for v in module.VARIANTS}
    phases = 5  # of one launch: the interpreter has one for each
    assert launches == {1: phases, 16: phases, 32: 5, 64: 8, 128: 8, None: 8}
    assert all("operands" not in c for v in module.VARIANTS[:2] for c in v["launches"])
    assert joined(planned).text.count(", 264, 5, num_warps=4") == 2 and module.RESIDENT == {264: 2}
    assert joined(planned).text.count("made(flags + 0 + head * 32)") == 2, "eight heads' own flags"
    rows = kernel_rows(planned.module, planned.emitted, planned.program)
    (row,) = [r for r in rows if r.symbol == joined(planned).symbol]
    assert row.launches == layers and row.phases == ("layer 0",)
    assert sum(r.launches for r in rows) == planned.program.num_launches == layers + 7
    assert len(gpu_compile.PHASE.findall(joined(planned).text)) == phases
    binaries = tuple(reported([], "", Path(), 1)[0])
    report = gpu_compile.report_of(row, binaries, card_of("cuda:90"), num_phases=phases)
    assert report.calls * report.launches == layers
    assert report.predicted_us == pytest.approx(report.floor_us + LAUNCH_US + 9 * LATENCY_US)
    weights = sum(r.weight_bytes for r in rows)
    assert row.weight_bytes > 0.1 * weights and all(r.bytes_a_token >= 0 for r in rows)
    assert planned.program.counters >= joined(planned).counters
    table = gpu_compile.memory_table(planned.program, card_of("cuda:90"), 0.9)
    assert f"of {5 * layers + 5} launches" in table, "graphs of many tokens are not joined"
    assert item.operands[module.TYPES.index("*i32")].space == "counters"


def test_no_more_programs_than_a_device_holds(planned: Planned) -> None:
    class Small(InterpreterDevice):
        def num_processors(self) -> int:
            return 114  # an H100 on PCIe

    module = load(joined(planned))
    with pytest.raises(EngineError, match="264 programs, 2 a multiprocessor; the device has 114"):
        check_residency([module], Small())
    module.RESIDENT = {228: 2}
    check_residency([module], Small())
    check_residency([module], InterpreterDevice())


def test_programs_a_multiprocessor_holds_by_what_they_use() -> None:
    """Against the limits that NVIDIA's occupancy calculator states for sm_90, and AMD's tables."""
    card, amd = card_of("cuda:90"), card_of("hip:gfx942")
    for usage, programs, limit in (
        (Usage(32, 0, 4), 16, "registers"),
        (Usage(16, 0, 4), 16, "threads"),
        (Usage(16, 0, 1), 32, "programs"),
        (Usage(33, 0, 4), 12, "registers"),  # lots of 256: 40 a thread
        (Usage(255, 0, 8), 1, "registers"),
        (Usage(64, 100 << 10, 4), 2, "shared memory"),
        (Usage(64, 114 << 10, 4), 1, "shared memory"),  # 1 KB of each is the system's
        (Usage(64, 228 << 10, 4), 0, "shared memory"),
    ):
        held = occupancy(usage, card)
        assert (held.programs, held.limit) == (programs, limit), usage
    assert occupancy(Usage(128, 0, 4), amd).programs == 4
    assert occupancy(Usage(129, 0, 4), amd).programs == 3
    assert occupancy(Usage(64, 40 << 10, 4), amd).limit == "shared memory"


def test_what_cannot_be_joined_is_refused_by_name(planned: Planned) -> None:
    source = next(s for s in planned.emitted.sources if "rms_norm_linear" in s.text)
    types = take_apart(source).types
    every = tuple(range(len(types)))

    def run(changed: KernelSource) -> persistent.Run:
        return persistent.Run("run", (changed,), (every,), (*types, "*i32"), len(types))

    card = card_of("cuda:90")
    assert persistent.emit(run(source), card).counters == persistent.LINE
    for old, new, told in (
        ("num_warps=4", "num_warps=8", "it has 8 warps"),
        ("num_warps=4", "num_warps=4, enable_fp_fusion=False", "it needs enable_fp_fusion"),
    ):
        changed = dataclasses.replace(source, text=source.text.replace(old, new))
        with pytest.raises(CodegenError, match=f"{source.symbol} cannot be a phase .*{told}"):
            persistent.emit(run(changed), card)
    asks = source.text.replace(
        "    if not INTERPRETED:\n        line =", "    if tl.program_id(0) > 0:\n        line ="
    )
    with pytest.raises(CodegenError, match="calls prefetch, which depends on the launch"):
        persistent.emit(run(dataclasses.replace(source, text=asks)), card)
    with pytest.raises(CodegenError, match=r"hip:gfx942 .* has no persistent decode"):
        persistent.emit(run(source), card_of("hip:gfx942"))
    with pytest.raises(ConfigError, match="only a GPU has launches"):
        CompileOptions.parse({"device": "cpu", "persistent_decode": True}).joined_launches()
    with pytest.raises(ConfigError, match="persistent_decode=1 is out of range"):
        CompileOptions.parse({"persistent_decode": 1})
