"""What benchmarks/gpu.py measures of ours: steps of a model with random weights, its kernels."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_clock import Clock, discard

PAGES = 8192  # of the KV pool, less where the model is small


class Model:
    """A config with random weights on a device, its graphs captured for the buckets asked for.

    form: "bf16", or what linears are quantised to ("int8", "int4", "fp8"). tuning: whom to ask
    about configurations, beside the model (codegen/triton/choice.py). captures: the buckets.
    """

    def __init__(
        self,
        config: dict[str, Any],
        buckets: list[int],
        length: int,
        clock: Clock,
        pages: int,
        form: str = "bf16",
        tuning: Any = None,
        captures: bool = True,
    ) -> None:
        from aios_compile.codegen.pack_weights import to_numpy
        from aios_compile.codegen.triton import binary_cache, compile_ahead
        from aios_compile.models.config import ModelConfig
        from aios_compile.models.parameters import parameter_shapes
        from aios_compile.runtime.batch import Limits
        from aios_compile.runtime.gpu_executor import GpuExecutor
        from aios_compile.runtime.torch_device import card_name, open_device
        from aios_compile.study.gpu_compile import plan_for
        from aios_compile.study.kernel_table import kernel_rows

        begin = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="aios-gpu-"))
        (folder / "config.json").write_text(json.dumps(config))
        tokens = max(512 if clock.cuda else 1, *buckets)
        sizes = {"max_num_batched_tokens": tokens, "max_num_seqs": min(256, tokens)}
        card = card_name(clock.device)
        forms = {} if form == "bf16" else {"quantization": form}
        planned = plan_for(folder, card, {"max_model_len": length, **sizes, **forms}, tuning)
        self.program = program = planned.program
        self.rows = kernel_rows(planned.module, planned.emitted, program)
        self.weight_bytes = sum(row.weight_bytes for row in self.rows)
        shapes = parameter_shapes(ModelConfig.from_dict(config)).values()
        values = sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)
        values -= config["vocab_size"] * config["hidden_size"]  # rows of ids; the head's count
        self.flops_a_token = 2.0 * values
        page, width = program.settings["page_size"], program.settings["max_pages_per_sequence"]
        self.limits = Limits(
            max_num_batched_tokens=program.sizes["T"], max_num_seqs=program.sizes["S"],
            max_num_logit_rows=program.sizes["R"], max_pages_per_sequence=width, num_pages=pages,
            page_size=page, max_model_len=length, vocab_size=program.settings["vocab_size"],
            token_buckets=tuple(sorted({*buckets, program.sizes["T"]})),
        )  # fmt: skip
        paths = []
        for source in planned.emitted.sources:
            paths.append(folder / f"{source.name}.py")
            paths[-1].write_text(source.text)
        plan_seconds = time.perf_counter() - begin
        if clock.cuda:
            compile_ahead.compile_ahead(planned.emitted.sources, card, folder, clock.jobs)
            kept = binary_cache.keep(folder / compile_ahead.CACHE)
            for name, data in kept:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        compile_seconds = time.perf_counter() - begin - plan_seconds
        weights = random_weights(program, to_numpy)
        device = open_device(clock.device)
        device.use_binaries(folder)
        modules = [device.load(path) for path in paths]
        self.executor = GpuExecutor(
            program, modules, weights, self.limits, device, captures=captures
        )
        if captures:
            self.executor.capture(buckets)
        self.start = {
            "plan_seconds": plan_seconds, "compile_seconds": compile_seconds,
            "ready_seconds": time.perf_counter() - begin, "compiled_at_start": device.num_compiled,
        }  # fmt: skip

    def fill(self, sequences: int, context: int, new: int = 1) -> int:
        """Run a batch of equal sequences; return its bucket."""
        from aios_compile.runtime.example_steps import equal_sequences

        executor = self.executor
        self.batch = equal_sequences(self.limits, sequences, context, new)
        result = executor.step(self.batch)
        assert np.all(result.finite[:sequences] == 1), "logits are numbers"
        return next(b for b in executor.buckets if b >= sequences * new)

    def floor_us(self, sequences: int, context: int, clock: Clock) -> float:
        """Return the roofline of a decode step: weights at the read bandwidth or their products at
        the bf16 peak, whichever is slower, and the KV cache at the read bandwidth.
        """
        products = sequences * self.flops_a_token / clock.flops_per_us
        weights = max(self.weight_bytes / clock.bytes_per_us(), products)
        return weights + self.kv_bytes(sequences, context) / clock.bytes_per_us()

    def kv_bytes(self, sequences: int, context: int) -> int:
        """Return the KV bytes that a decode step of equal sequences reads."""
        from aios_compile.runtime.program_runner import state_page_bytes

        return sequences * context * sum(state_page_bytes(self.program)) // self.limits.page_size

    def close(self) -> None:
        self.executor.close()


def random_weights(program: Any, to_numpy: Callable[[Any], Any]) -> dict[str, Any]:
    """Return weights that keep activations in range: never zeros, norms near one."""
    import torch

    draw = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.03
    weights = {}
    for entry in program.weights:
        if entry.packed:
            weights[entry.name] = to_numpy(_random_codes(entry))
            continue
        count, dtype = int(np.prod(entry.shape)), getattr(torch, entry.dtype)
        values = (1 + draw if len(entry.shape) == 1 else draw).to(dtype)
        weights[entry.name] = to_numpy(values.repeat(-(-count // len(values)))[:count])
    return weights


def _random_codes(entry: Any) -> Any:
    """Return rows of random codes with small scales, in the layout of a quantised weight."""
    import torch

    from aios_compile.codegen.plane import PREFIX, plane_of
    from aios_compile.ir.quant_format import QuantFormat
    from aios_compile.ir.quantized import SCALE_DTYPES

    assert entry.packed.startswith(PREFIX), entry.packed
    form = QuantFormat.parse(entry.packed.removeprefix(PREFIX))
    plane = plane_of(form, form.depth(entry.shape[1]))
    assert not plane.minimum_dtype, "codes with a scale a group"
    shape = (entry.shape[0], plane.row_bytes)
    rows = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    scale = 0.05 / 2 ** (plane.bits - 1)
    if plane.is_float:  # e4m3 below 2 in size: no code of a NaN
        rows, scale = rows & 0b10111111, 0.05
    scales = torch.full((1, plane.depth // plane.group), scale, dtype=SCALE_DTYPES[form.scales])
    raw = scales.view(torch.uint8)
    rows[:, plane.scale_begin : plane.scale_begin + raw.shape[1]] = raw
    return rows


def correct_row(case: str, clock: Clock) -> dict[str, Any]:
    """Hold a tiny model in captured graphs against eager on the same last level."""
    from aios_compile.runtime.torch_device import open_device
    from tests.interpreted.harness import assert_close, batch, model

    name, dtype, tolerance = case.split()
    built = model(name, dtype, tokens=24 if clock.cuda else 8)
    ours, eager = built.executor(open_device(clock.device)), built.eager()
    ours.capture(None if clock.cuda else [8])
    steps = ([(0, 5), (0, 2)], [(5, 1), (2, 4), (0, 3)], [(6, 1), (6, 1), (3, 1)], [(7, 1)])
    for number, sequences in enumerate(steps if clock.cuda else steps[:1]):
        given = batch(sequences, seed=number)
        for memory in (ours.staging.memory, ours.staging.packet):
            memory.fill_(255)  # what an earlier step left must not matter
        assert_close(ours.step(given), eager.step(given), float(tolerance))
    found = {"graphs": len(ours.graphs), "late_compilations": ours.num_late_compilations}
    ours.close()
    return {"tolerance": float(tolerance), **found}


def decode_row(model: Model, sequences: int, context: int, clock: Clock) -> dict[str, Any]:
    """Time a decode step of equal sequences: the graph alone; one after another; begun ahead.

    host_us: of the executor's part of a step that is begun ahead, waits left out; the engine's rows
    have the rest. busy: share of the time in which the device runs a graph, with steps begun ahead.
    """
    bucket = model.fill(sequences, context)
    executor = model.executor
    step_us = clock.median_us(executor.graphs[bucket].replay)
    begin = time.perf_counter()
    for _ in range(clock.repeats):
        executor.step(model.batch)
    single_us = (time.perf_counter() - begin) * 1e6 / clock.repeats
    ahead_us, host_us = steps_ahead(model, sequences, clock.repeats)
    floor_us = model.floor_us(sequences, context, clock)
    return {
        "step_us": step_us, "floor_us": floor_us, "share": floor_us / step_us,
        "tokens_per_s": sequences * 1e6 / step_us, "single_us": single_us, "ahead_us": ahead_us,
        "host_us": host_us, "busy": step_us / ahead_us,
        "bytes": model.weight_bytes + model.kv_bytes(sequences, context),
        "late_compilations": executor.num_late_compilations,
    }  # fmt: skip


def steps_ahead(model: Model, sequences: int, repeats: int) -> tuple[float, float]:
    """Begin each step before the one before it is waited for, as the engine does, its ids those
    that the one before samples; return the microseconds a step, and how many the host was busy.
    """
    executor, rows = model.executor, np.arange(sequences)
    running = executor.begin(model.batch)
    waited, begin = executor.waited_us, time.perf_counter()
    for _ in range(repeats):
        following = executor.begin(model.batch, rows)
        running.wait()
        running = following
    running.wait()
    us = (time.perf_counter() - begin) * 1e6
    return us / repeats, (us - (executor.waited_us - waited)) / repeats


def kernel_rows(model: Model, context: int, clock: Clock) -> list[dict[str, Any]]:
    """Time each kernel of a decode step: all its calls as one graph, weights of every layer."""
    model.fill(1, context)
    executor, found = model.executor, []
    every, sizes = executor.calls, executor.sizes_of(1)
    rows = {row.symbol: row for row in model.rows}
    for index, kernel in enumerate(model.program.kernels):
        executor.calls = [call for call in every if call.kernel == index]
        graph = executor.device.capture(lambda: executor.launch_all(sizes))
        row, calls = rows[kernel.symbol], len(executor.calls)
        us, size = clock.median_us(graph.replay) / calls, row.bytes_a_token / calls
        share = size / clock.bytes_per_us() / us
        found.append({"name": kernel.name, "calls": calls, "us": us, "bytes": size, "share": share})
    executor.calls = every
    return found


def prefill_row(model: Model, tokens: int, clock: Clock) -> dict[str, Any]:
    """Time a prefill step of one sequence, beside cuBLAS on the same matrices alone."""
    import torch

    bucket = model.fill(1, tokens, tokens)
    step_us = clock.median_us(model.executor.graphs[bucket].replay)
    layers = [w for w in model.program.weights if len(w.shape) == 2]
    layers = [w for w in layers if w.shape[0] < model.limits.vocab_size]
    library_us = 0.0
    for shape in sorted({w.shape for w in layers}):
        x, w = (
            torch.randn(n, shape[1], device=clock.torch_device).bfloat16()
            for n in (tokens, shape[0])
        )
        count = sum(w.shape == shape for w in layers)
        library_us += count * clock.median_us(partial(_product, x, w))
    return {
        "step_us": step_us, "cublas_us": library_us, "share": library_us / step_us,
        "tokens_per_s": tokens * 1e6 / step_us,
    }  # fmt: skip


def _product(x: Any, w: Any) -> None:
    import torch

    discard(torch.mm(x, w.T))
