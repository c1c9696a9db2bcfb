"""A whole start on a GPU that is not there: compiled ahead, captured, stepped; what happened.

    python -m tests.interpreted.aot_engine FOLDER OPTIONS [PARTS of names]    (no interpreter)

Everything is as on a GPU but for the launches, which go through Triton's own look-up of a compiled
kernel (`warmup`) and stop there. A kernel that the artefact lacks is compiled by it, and counted.
A process of its own. OPTIONS: of load_and_compile, as JSON.
With parts of names, modules that have none of them are neither compiled nor looked up.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from aios_compile import api, compiled_model, gpu_kernel_selection
from aios_compile.codegen.triton import compile_ahead
from aios_compile.codegen.triton.binary_cache import Compilations, every_launch, use
from aios_compile.runtime import torch_device
from aios_compile.runtime.torch_device import RecordedGraph, TorchDevice
from tests.interpreted.harness import batch

CANDIDATE = re.compile(r"_(rows|dot|tile|descriptor)\d+_")  # in a kernel's name
CARD, GPU = "cuda:90", "Imaginary H200"


class FakeDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(CARD.partition(":")[2]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Warm:
    """A kernel that is looked up, with the arguments' specialisations, and not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            assert self.kernel.warmup(*arguments, grid=grid, **options) is not None
            NoGpu.made.launched.append(self.__name__)

        return launch


def passed_over(*arguments: Any, **options: Any) -> None:
    """Stand for a launch of a module that is not looked at."""


class TickMark:
    """A mark on the clock of NoGpu."""

    is_passed = True

    def record(self) -> None:
        self.at = NoGpu.made.now

    def wait(self) -> None:
        pass

    def micros_since(self, earlier: Any) -> float:
        return float(self.at - earlier.at)


class TickGraph(RecordedGraph):
    """A graph whose replay takes a microsecond a launch, half of one where it is a candidate's."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.micros = sum(0.5 if CANDIDATE.search(name) else 1.0 for name in names)

    def replay(self) -> None:
        NoGpu.made.now += self.micros


class NoGpu(TorchDevice):
    """A card whose memory is the host's. Graphs are counted, replays only take time."""

    made: NoGpu
    runs_ahead = True

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__("cpu")
        self.parts = parts
        self.compilations = Compilations()
        self.captured, self.now = 0, 0.0
        self.launched: list[str] = []
        NoGpu.made = self

    @property
    def num_compiled(self) -> int:
        return len(self.compilations.names)

    def use_binaries(self, artefact: Path) -> None:
        use(artefact)

    def host_bytes(self, num_bytes: int) -> Any:
        return torch.zeros(max(num_bytes, 1), dtype=torch.uint8).numpy()

    def load(self, path: Path) -> Any:
        module = super().load(path)
        if not looked_at(path.stem, self.parts):
            module.launch = passed_over
        for known in every_launch(module):
            known.launch["kernel"] = Warm(known.launch["kernel"])
        return module

    def capture(self, run: Callable[[], None]) -> RecordedGraph:
        self.captured += 1
        self.launched = []
        run()
        return TickGraph(self.launched)

    def mark(self) -> Any:
        return TickMark()

    def memory(self) -> tuple[int, int]:
        return 2 << 30, 2 << 30

    def synchronize(self) -> None:
        pass


def looked_at(name: str, parts: tuple[str, ...]) -> bool:
    return not parts or any(part in name for part in parts)


def compile_only(parts: tuple[str, ...]) -> None:
    """Let modules be compiled ahead whose names have one of the parts."""
    plain = compile_ahead.compile_ahead

    def some(sources: Any, *rest: Any) -> Any:
        return plain([s for s in sources if looked_at(s.name, parts)], *rest)

    compile_ahead.compile_ahead = some


def main() -> None:
    folder, options, parts = Path(sys.argv[1]), json.loads(sys.argv[2]), tuple(sys.argv[3:])
    compile_only(parts)
    knobs.cache.dir = str(folder / "triton-home")  # what is compiled all the same goes here
    driver.set_active(FakeDriver())
    api.require_cuda = torch_device.require_cuda = lambda name: None
    api.card_name = torch_device.card_name = lambda name: CARD
    api.gpu_name = torch_device.gpu_name = lambda name: GPU
    for user in (compiled_model, gpu_kernel_selection):
        user.open_device = lambda name: NoGpu(parts)  # type: ignore[assignment,return-value]
    compiled_model.CompiledModel.warm_up = lambda self: None  # type: ignore[method-assign]
    options |= {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    model = api.load_and_compile(
        str(folder / "model"), device="cuda", progress=False, num_threads=2,
        cache_dir=str(folder / "cache"), **options,
    )  # fmt: skip
    executor: Any = model.engine.executor
    at_start = NoGpu.made.num_compiled
    for sequences in ([(0, 5), (0, 2)], [(5, 1), (2, 4), (0, 3)], [(6, 1)], [(7, 1), (3, 1)]):
        executor.step(batch(sequences))
    given = batch([(12, 1)])
    given.allowed_ids, given.allowed_starts = np.arange(3000) % 50, np.array([0, 3000])
    executor.step(given)  # the lists grow: captured once more, compiled never
    late = executor.num_late_compilations
    kept = {p.parent.name for p in (model.artefact_path / "triton").rglob("*.cubin")}
    NoGpu.made.launched, choices = [], executor.choices
    executor.launch_all(executor.sizes_of(executor.buckets[-1]))
    ran = NoGpu.made.launched
    executor.graphs.clear()
    executor._state_offsets = [offset + 4 for offset in executor._state_offsets]
    executor.step(batch([(12, 1)]))  # a planted fault: addresses that no binary was made for
    print(json.dumps({
        "at_start": at_start, "late": late, "misaligned": executor.num_late_compilations,
        "graphs": NoGpu.made.captured, "buckets": len(executor.buckets), "kept": len(kept),
        "launches": executor.program.num_launches, "frozen": gc.get_freeze_count(),
        "ahead": executor.overlap == "always",
        "chosen": sum(set(names) != {"standard"} for names in (choices.chosen or {}).values()),
        "told": [line for line in model.report().notes if "select_kernels" in line],
        "candidates_run": sum(bool(CANDIDATE.search(name)) for name in ran),
    }))  # fmt: skip
    model.close()
    assert not gc.get_freeze_count(), "closed: all is the collector's again"


if __name__ == "__main__":
    main()
