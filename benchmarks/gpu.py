"""The first minutes on a GPU: is it right, then how fast. One part a call, each below 8 minutes.

    PYTHONPATH=. python benchmarks/gpu.py correct              tiny models against eager
    PYTHONPATH=. python benchmarks/gpu.py decode [--batch 1,8,64] [--context 256]
    PYTHONPATH=. python benchmarks/gpu.py kernels              each kernel of a decode step
    PYTHONPATH=. python benchmarks/gpu.py prefill [--tokens 512,2048]

--config: a folder with a config.json (default: the shape of Qwen3-0.6B); weights are random. Every
part prints JSON lines, and appends them to --out. Read bandwidth is measured in the same run with a
sum over 4 GiB; shares are of the floor: every weight and KV entry once over that bandwidth. Step
times are CUDA events around replays of captured graphs, medians of 30.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
    "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
REPEATS = 30


def median_us(run: Callable[[], None]) -> float:
    """Return the median microseconds of `run` on the GPU."""
    import torch

    times = []
    for _ in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def discard(value: Any) -> None:
    """Drop a result: reading its value would wait for the GPU."""


def read_bytes_per_us() -> float:
    """Return the read bandwidth: a sum over 4 GiB of random float32."""
    import torch

    data = torch.rand(1 << 30, device="cuda")
    return 4 * data.numel() / median_us(lambda: discard(data.sum()))


class Model:
    """A config with random weights on the GPU, its graphs captured for the buckets asked for."""

    def __init__(self, config: Path, buckets: list[int], length: int) -> None:
        from aios_compile.codegen.pack_weights import to_numpy
        from aios_compile.runtime.batch import Limits
        from aios_compile.runtime.gpu_executor import GpuExecutor
        from aios_compile.runtime.torch_device import CudaDevice, card_name
        from aios_compile.study.gpu_compile import plan_for
        from aios_compile.study.kernel_table import kernel_rows

        begin = time.perf_counter()
        sizes = {"max_num_batched_tokens": max(512, *buckets), "max_num_seqs": 256}
        planned = plan_for(config, card_name("cuda"), {"max_model_len": length, **sizes})
        self.program = program = planned.program
        self.rows = kernel_rows(planned.module, planned.emitted, program)
        self.weight_bytes = sum(row.weight_bytes for row in self.rows)
        page, width = program.settings["page_size"], program.settings["max_pages_per_sequence"]
        self.limits = Limits(
            max_num_batched_tokens=program.sizes["T"], max_num_seqs=program.sizes["S"],
            max_num_logit_rows=program.sizes["R"], max_pages_per_sequence=width,
            num_pages=8192, page_size=page, max_model_len=length,
            vocab_size=program.settings["vocab_size"],
            token_buckets=tuple(sorted({*buckets, program.sizes["T"]})),
        )  # fmt: skip
        folder, paths = Path(tempfile.mkdtemp(prefix="aios-gpu-")), []
        for source in planned.emitted.sources:
            paths.append(folder / f"{source.name}.py")
            paths[-1].write_text(source.text)
        import torch

        draw = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.03
        weights = {}
        for entry in program.weights:
            count = int(np.prod(entry.shape))
            dtype = getattr(torch, entry.dtype)
            values = (1 + draw if len(entry.shape) == 1 else draw).to(dtype)
            weights[entry.name] = to_numpy(values.repeat(-(-count // len(values)))[:count])
        device = CudaDevice("cuda")
        modules = [device.load(path) for path in paths]
        self.executor = GpuExecutor(program, modules, weights, self.limits, device)
        planned_seconds = time.perf_counter() - begin
        self.executor.capture(buckets)
        ready = time.perf_counter() - begin
        say("start", plan_seconds=planned_seconds, ready_seconds=ready, buckets=buckets)

    def fill(self, sequences: int, context: int, new: int = 1) -> int:
        """Stage a batch of equal sequences; return the bucket."""
        from aios_compile.runtime.batch import Batch

        executor, limits = self.executor, self.limits
        tokens, page = sequences * new, limits.page_size
        pages = -(-context // page)
        tables = np.zeros((sequences, limits.max_pages_per_sequence), np.int64)
        tables[:, :pages] = 1 + np.arange(sequences * pages).reshape(sequences, pages) % (
            limits.num_pages - 1
        )
        positions = np.tile(np.arange(context - new, context), sequences)
        owner = np.repeat(np.arange(sequences), new)
        zeros, ones = np.zeros(sequences, np.int64), np.ones(sequences, np.float32)
        starts, none = np.zeros(sequences + 1, np.int64), np.zeros(0, np.int64)
        given = Batch(
            token_ids=np.random.default_rng(0).integers(0, limits.vocab_size, tokens),
            positions=positions, sequence_lengths=positions + 1,
            slots=tables[owner, positions // page] * page + positions % page,
            query_starts=np.arange(sequences + 1) * new, context_lengths=zeros + context,
            page_tables=tables, logit_rows=np.arange(1, sequences + 1) * new - 1,
            temperature=0 * ones, top_k=zeros, top_p=ones, min_p=0 * ones, seeds=zeros,
            sample_positions=zeros + context, repetition_penalty=ones,
            presence_penalty=0 * ones, frequency_penalty=0 * ones, penalty_starts=starts,
            penalty_ids=none, penalty_counts=none, bias_starts=starts, bias_ids=none,
            bias_values=np.zeros(0, np.float32), allowed_starts=starts, allowed_ids=none,
            logprob_counts=zeros, given_ids=zeros, has_given=zeros,
        )  # fmt: skip
        self.batch = given
        executor.step(given)
        return next(b for b in executor.buckets if b >= tokens)

    def kv_bytes(self, sequences: int, context: int) -> int:
        """Return the KV bytes that a decode step of equal sequences reads."""
        from aios_compile.runtime.program_runner import state_page_bytes

        return sequences * context * sum(state_page_bytes(self.program)) // self.limits.page_size


OUT: list[Path] = []


def say(part: str, **values: Any) -> None:
    """Print one JSON line, and append it to --out."""
    line = json.dumps({"part": part, **values}, default=str)
    print(line, flush=True)
    for path in OUT:
        with path.open("a") as file:
            file.write(line + "\n")


def correct(arguments: argparse.Namespace) -> None:
    """Hold tiny models in captured graphs against eager on the same last level."""
    from aios_compile.runtime.torch_device import CudaDevice
    from tests.interpreted.harness import assert_close, batch, model

    cases = (
        ("qwen3_gqa", "float32", 1e-4), ("qwen3_gqa", "bfloat16", 3e-2),
        ("mistral_window", "float16", 5e-3), ("llama_odd_sizes", "float32", 1e-4),
    )  # fmt: skip
    steps = ([(0, 10), (0, 7)], [(10, 1), (7, 9), (0, 3)], [(11, 1), (16, 1), (3, 1)], [(17, 1)])
    for name, dtype, tolerance in cases:
        built = model(name, dtype, tokens=24)
        ours, eager = built.executor(CudaDevice("cuda")), built.eager()
        ours.capture()
        for number, sequences in enumerate(steps):
            given = batch(sequences, seed=number)
            assert_close(ours.step(given), eager.step(given), tolerance)
        say("correct", model=name, dtype=dtype, tolerance=tolerance, graphs=len(ours.graphs))
        ours.close()


def decode(arguments: argparse.Namespace) -> None:
    """Time decode steps of equal sequences."""
    batches = [int(b) for b in arguments.batch.split(",")]
    model = Model(arguments.config, batches, arguments.context + 64)
    bandwidth = read_bytes_per_us()
    for sequences in batches:
        bucket = model.fill(sequences, arguments.context)
        step_us = median_us(model.executor.graphs[bucket].replay)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            model.executor.step(model.batch)
        whole_us = (time.perf_counter() - begin) * 1e6 / REPEATS
        moved = model.weight_bytes + model.kv_bytes(sequences, arguments.context)
        say(
            "decode", batch=sequences, context=arguments.context, step_us=step_us,
            host_us=whole_us - step_us, floor_us=moved / bandwidth,
            share=moved / bandwidth / step_us, tokens_per_s=sequences * 1e6 / step_us,
            bytes_per_us=bandwidth,
        )  # fmt: skip


def kernels(arguments: argparse.Namespace) -> None:
    """Time each kernel of a decode step: all its calls as one graph, weights of every layer."""
    model = Model(arguments.config, [1], arguments.context + 64)
    model.fill(1, arguments.context)
    bandwidth, executor = read_bytes_per_us(), model.executor
    every, sizes = executor.calls, executor.sizes_of(1)
    rows = {row.symbol: row for row in model.rows}
    for index, kernel in enumerate(model.program.kernels):
        executor.calls = [call for call in every if call.kernel == index]
        graph = executor.device.capture(lambda: executor.launch_all(sizes))
        row, calls = rows[kernel.symbol], len(executor.calls)
        us, size = median_us(graph.replay) / calls, row.bytes_a_token / calls
        say("kernel", name=kernel.name, calls=calls, us=us, bytes=size,
            share=size / bandwidth / us)  # fmt: skip
    executor.calls = every


def prefill(arguments: argparse.Namespace) -> None:
    """Time prefill steps of one sequence, beside cuBLAS on the same matrices."""
    import torch

    lengths = [int(t) for t in arguments.tokens.split(",")]
    model = Model(arguments.config, lengths, max(lengths) + 64)
    layers = [w for w in model.program.weights if len(w.shape) == 2]
    for tokens in lengths:
        model.fill(1, tokens, tokens)
        step_us = median_us(model.executor.graphs[tokens].replay)
        cublas = 0.0
        for shape in {w.shape for w in layers}:
            x, w = (torch.randn(n, shape[1], device="cuda").bfloat16() for n in (tokens, shape[0]))
            count = sum(w.shape == shape for w in layers if w.shape[0] < model.limits.vocab_size)
            cublas += count * median_us(lambda x=x, w=w: discard(torch.mm(x, w.T))) if count else 0
        say("prefill", tokens=tokens, step_us=step_us, cublas_us=cublas, share=cublas / step_us,
            tokens_per_s=tokens * 1e6 / step_us)  # fmt: skip


PARTS = {"correct": correct, "decode": decode, "kernels": kernels, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", default="512,2048")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    OUT.extend([arguments.out] if arguments.out else [])
    if arguments.config is None:
        arguments.config = Path(tempfile.mkdtemp(prefix="aios-config-"))
        (arguments.config / "config.json").write_text(json.dumps(CONFIG))
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
