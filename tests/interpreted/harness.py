"""A zoo model on the Triton target in the interpreter, and in eager on the same last level."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.pack_weights import pack_weights
from aios_compile.codegen.program import Program
from aios_compile.config import CompileOptions
from aios_compile.ir import quantized
from aios_compile.ir.module import IRModule
from aios_compile.model_source import open_source
from aios_compile.runtime.batch import Batch, Limits
from aios_compile.runtime.device import Device
from aios_compile.runtime.gpu_executor import GpuExecutor
from aios_compile.runtime.torch_device import InterpreterDevice
from aios_compile.study.eager_executor import EagerExecutor
from aios_compile.study.plan_model import plan_model
from tests import zoo

PAGES, WIDTH, PAGE, SEQUENCES = 32, 8, 16, 4


class _Memory:
    """A TensorWriter that keeps arrays in memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def add_tensor(self, name: str, array: Any, dtype: str | None = None) -> None:
        self.arrays[name] = array.copy()


@dataclasses.dataclass
class Model:
    """A zoo model lowered for the Triton target."""

    name: str
    module: IRModule
    emitted: Emitted
    program: Program
    paths: list[Path]
    weights: dict[str, Any]
    limits: Limits
    read: Any

    def executor(self, device: Device | None = None, **options: Any) -> GpuExecutor:
        device = device or InterpreterDevice()
        modules = [device.load(path) for path in self.paths]
        return GpuExecutor(self.program, modules, self.weights, self.limits, device, **options)

    def eager(self) -> EagerExecutor:
        return EagerExecutor(self.module, self.read, self.limits)


@functools.cache
def model(
    name: str,
    dtype: str = "float32",
    tokens: int = 8,
    quantization: str | None = None,
    persistent: bool = False,
) -> Model:
    """Capture, rewrite, emit and lower a zoo model for steps of so many tokens."""
    folder = Path(tempfile.gettempdir()) / "aios-zoo"
    sizes = {"max_model_len": 64, "max_num_seqs": SEQUENCES, "max_num_batched_tokens": tokens}
    given = {"device": "interpreter", "quantization": quantization, **sizes}
    given |= {"persistent_decode": persistent}
    options = CompileOptions.parse({k: v for k, v in given.items() if v is not None})
    source = open_source(str(zoo.make(name, folder, dtype)), options)
    planned = plan_model(source, options, card="cuda:90")
    module, emitted, program = planned.module, planned.emitted, planned.program
    memory = _Memory()
    pack_weights(program, module, source.read, memory)
    place = Path(tempfile.mkdtemp(prefix="aios-triton-"))
    paths = []
    for kernel in emitted.sources:
        paths.append(place / f"{kernel.name}.py")
        paths[-1].write_text(kernel.text)
    limits = Limits(
        max_num_batched_tokens=tokens, max_num_seqs=SEQUENCES,
        max_num_logit_rows=program.sizes["R"],
        max_pages_per_sequence=WIDTH, num_pages=PAGES, page_size=PAGE, max_model_len=64,
        vocab_size=zoo.config_of(name)["vocab_size"],
    )  # fmt: skip
    return Model(name, module, emitted, program, paths, memory.arrays, limits, source.read)


def batch(sequences: Sequence[tuple[int, int]], first_page: int = 1, seed: int = 0) -> Batch:
    """Return a batch of (tokens in the cache, new tokens); sequence s has its pages in order."""
    generator = np.random.default_rng(seed)
    ids, positions, slots, starts, tables = [], [], [], [0], []
    for s, (done, new) in enumerate(sequences):
        where = np.arange(done, done + new)
        pages = first_page + s * 4 + np.arange(4)
        ids.append(generator.integers(0, 120, new))
        positions.append(where)
        slots.append(pages[where // PAGE] * PAGE + where % PAGE)
        starts.append(starts[-1] + new)
        tables.append(np.concatenate([pages, np.zeros(WIDTH - 4, np.int64)]))
    rows = len(sequences)
    ends = np.cumsum([new for _, new in sequences]) - 1
    zeros, ones = np.zeros(rows, np.int64), np.ones(rows, np.float32)
    none = np.zeros(0, np.int64)
    return Batch(
        token_ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        sequence_lengths=np.concatenate(positions) + 1,
        slots=np.concatenate(slots),
        query_starts=np.array(starts),
        context_lengths=np.array([done + new for done, new in sequences]),
        page_tables=np.stack(tables),
        logit_rows=ends,
        temperature=0 * ones,
        top_k=zeros,
        top_p=ones,
        min_p=0 * ones,
        seeds=zeros + 7,
        sample_positions=np.array([done + new for done, new in sequences]),
        repetition_penalty=ones,
        presence_penalty=0 * ones,
        frequency_penalty=0 * ones,
        penalty_starts=np.zeros(rows + 1, np.int64),
        penalty_ids=none,
        penalty_counts=none,
        bias_starts=np.zeros(rows + 1, np.int64),
        bias_ids=none,
        bias_values=np.zeros(0, np.float32),
        allowed_starts=np.zeros(rows + 1, np.int64),
        allowed_ids=none,
        logprob_counts=zeros,
        given_ids=zeros,
        has_given=zeros,
    )


def exact_activations(x: torch.Tensor) -> Any:
    """Stand in for the rounding of activations: the Triton kernels do not round them."""
    return x, x.new_ones(*x.shape[:-1], x.shape[-1] // quantized.ACTIVATION_GROUP)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compare two step results: logits within a tolerance, sampled tokens exactly."""
    logits = torch.from_numpy(np.array(ours.logits))
    torch.testing.assert_close(
        logits, torch.from_numpy(np.array(theirs.logits)), atol=tolerance, rtol=tolerance
    )
    assert list(ours.sampled_ids) == list(theirs.sampled_ids)
