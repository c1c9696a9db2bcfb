"""The first minutes on a GPU: is it right, then how fast. Parts of less than 8 minutes each.

    PYTHONPATH=. python -m benchmarks.gpu ours   --out results.jsonl    correctness, then times
    PYTHONPATH=. python -m benchmarks.gpu ledger --out results.jsonl    time candidates of kernels
    PYTHONPATH=. python -m benchmarks.gpu peers  --out results.jsonl    torch.compile, cuBLAS, SDPA
    PYTHONPATH=. python -m benchmarks.gpu engine --out results.jsonl    many requests, the start

Each result is one JSON line in --out as soon as it is there. A part that runs out of --minutes, or
dies, is called again and goes on where it was: rows that are there are not run twice. A row that
fails is written with its error, and the rows after it still run; `--again` runs failed rows anew.
Weights are random. Read bandwidth (a sum over 4 GiB) and the bf16 peak (a product of 8192 cubed)
are measured in the same run; a share is of the floor: every weight and KV entry once over that
bandwidth, or the products at that peak where they take longer. No row uses cuBLAS but its own: a
model's kernels are all Triton. Times are CUDA events around replays of captured graphs, medians of
--repeats. The short table at the end is of all rows in --out. --device interpreter runs everything
on a CPU, for tests. `ledger` times the candidates of every linear in whole steps and writes what is
best into the package (--ledgers): starts on this GPU then time nothing, and the rows of `ours` and
`engine` run what was chosen.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from aios_compile.codegen.triton.kernel_ledger import FOLDER
from benchmarks import gpu_ledger, gpu_ours, gpu_random
from benchmarks.gpu_clock import Clock
from benchmarks.shapes import SHAPES, config_of

CASES = (
    "qwen3_gqa float32 1e-4", "qwen3_gqa bfloat16 3e-2", "mistral_window float16 5e-3",
    "llama_odd_sizes float32 1e-4",
)  # fmt: skip
Row = tuple[str, Callable[[], Any]]


class Results:
    """The rows of a file: what is there, and what is added."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {}
        for line in lines:
            row = json.loads(line)
            self.rows[row["row"]] = row
        self.again = again

    def lacks(self, name: str) -> bool:
        row = self.rows.get(name)
        return row is None or (self.again and "error" in row)

    def add(self, name: str, values: dict[str, Any]) -> None:
        row = {"row": name, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **values}
        self.rows[name] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=float) + "\n")
        print(json.dumps(row, default=float), flush=True)


def is_broken() -> bool:
    """Return whether the card refuses everything from now on: a new process is needed."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    torch.cuda.empty_cache()
    return False


def run(rows: Iterable[Row], results: Results, seconds: float) -> bool:
    """Run the rows that are lacking until the time is over; return whether all are there.

    A kernel that accesses what is not its own spoils the process: it ends, and is called again.
    """
    end = time.monotonic() + seconds
    for name, measure in rows:
        if not results.lacks(name):
            continue
        if time.monotonic() > end:
            print(f"time is over before {name!r}: call this part again")
            return False
        try:
            found = measure()
            results.add(name, found if isinstance(found, dict) else {"rows": found})
        except Exception as error:  # noqa: BLE001 - the rows after it may still tell something
            traceback.print_exc()
            results.add(name, {"error": f"{type(error).__name__}: {error}"[:2000]})
        gc.collect()
        if is_broken():
            print(f"the card failed in {name!r}: call this part again")
            return False
    return True


class Ours:
    """The rows of `ours`; a model is made when its first row runs, and dropped for the next."""

    def __init__(self, options: argparse.Namespace, clock: Clock) -> None:
        self.options, self.clock = options, clock
        self._model: tuple[tuple[str, str], gpu_ours.Model] | None = None
        self._tuning = gpu_ledger.known(options, clock)

    def model(self, shape: str, form: str = "bf16") -> gpu_ours.Model:
        options = self.options
        if self._model is None or self._model[0] != (shape, form):
            self.close()
            quantized = form != "bf16"
            longest = max([options.context, *([] if quantized else options.tokens)]) + 64
            buckets = [1] if quantized else [*options.batch, *options.tokens]
            config = config_of(shape, options.layers)
            made = gpu_ours.Model(
                config, buckets, longest, self.clock, options.pages, form, self._tuning
            )
            self._model = ((shape, form), made)
        return self._model[1]

    def close(self) -> None:
        if self._model is not None:
            self._model[1].close()
        self._model = None
        gc.collect()

    def rows(self) -> Iterable[Row]:
        options, clock = self.options, self.clock
        for case in CASES[: options.cases]:
            yield f"ours correct {case}", lambda case=case: gpu_ours.correct_row(case, clock)
        yield (
            f"ours correct {options.random} random programs of seed {options.seed}",
            lambda: gpu_random.random_row(options.random, options.seed, clock),
        )
        yield "machine", lambda: machine(clock)
        for shape in options.shapes:
            yield f"ours {shape} start", lambda shape=shape: self.model(shape).start
            for batch in options.batch:
                name = f"ours {shape} decode batch {batch} context {options.context}"
                yield (
                    name,
                    lambda shape=shape, batch=batch: gpu_ours.decode_row(
                        self.model(shape), batch, options.context, clock
                    ),
                )
            yield (
                f"ours {shape} kernels",
                lambda shape=shape: gpu_ours.kernel_rows(self.model(shape), options.context, clock),
            )
            for tokens in options.tokens:
                yield (
                    f"ours {shape} prefill {tokens}",
                    lambda shape=shape, tokens=tokens: gpu_ours.prefill_row(
                        self.model(shape), tokens, clock
                    ),
                )
        for form in options.forms:  # of the last shape, the largest, at batch 1
            shape = options.shapes[-1]
            yield (
                f"ours {shape} {form} decode batch 1 context {options.context}",
                lambda shape=shape, form=form: gpu_ours.decode_row(
                    self.model(shape, form), 1, options.context, clock
                ),
            )
        self.close()


def peer_rows(options: argparse.Namespace, clock: Clock) -> Iterable[Row]:
    """Yield the rows of `peers`."""
    from benchmarks import gpu_peers

    yield "machine", lambda: machine(clock)
    for shape in options.shapes:
        config = config_of(shape, options.layers)
        for batch in options.peer_batch:
            for compiled in (False, True) if clock.cuda else (False,):
                kind = "torch.compile max-autotune" if compiled else "torch eager"
                name = f"{kind} {shape} decode batch {batch} context {options.context}"
                yield (
                    name,
                    lambda c=config, b=batch, k=compiled: gpu_peers.decode_row(
                        c, b, options.context, clock, k
                    ),
                )
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        for tokens in (1, *options.tokens):
            name = f"cuBLAS {shape} gate_up {tokens} tokens"
            yield name, lambda n=2 * inner, k=hidden, t=tokens: gpu_peers.linear_row(n, k, t, clock)
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        for length in options.tokens:
            yield (
                f"SDPA {shape} prefill {length}",
                lambda h=heads, g=groups, d=config["head_dim"], n=length: gpu_peers.attention_row(
                    h, g, d, n, clock
                ),
            )


def engine_rows(options: argparse.Namespace, clock: Clock) -> Iterable[Row]:
    """Yield the rows of `engine`."""
    from benchmarks import gpu_engine

    for shape in options.shapes[:1]:
        yield f"engine {shape}", lambda shape=shape: gpu_engine.engine_row(shape, options, clock)
        yield (
            f"transformers continuous batching {shape}",
            lambda shape=shape: gpu_engine.transformers_row(shape, options, clock),
        )
        yield (
            f"transformers generate {shape}",
            lambda shape=shape: gpu_engine.generate_row(shape, options, clock),
        )


def ledger_rows(options: argparse.Namespace, clock: Clock) -> Iterable[Row]:
    """Yield the rows of `ledger`: a model each, bf16 of every shape, other forms of the last."""
    last = [(options.shapes[-1], form) for form in options.forms]
    for shape, form in [*((shape, "bf16") for shape in options.shapes), *last]:
        yield (
            f"ledger {shape} {form}",
            lambda shape=shape, form=form: gpu_ledger.ledger_row(shape, form, options, clock),
        )


def machine(clock: Clock) -> dict[str, Any]:
    """Return the card, the versions and the measured peaks."""
    import torch
    import triton

    name = torch.cuda.get_device_name() if clock.cuda else "interpreter"
    return {
        "card": name, "torch": torch.__version__, "triton": triton.__version__,
        "bytes_per_us": clock.bytes_per_us(), "flops_per_us": clock.flops_per_us,
        "fp8_flops_per_us": clock.fp8_flops_per_us,
    }  # fmt: skip


SHOWN = (
    "together",
    "step_us",
    "us",
    "share",
    "busy",
    "host_us",
    "tokens_per_s",
    "ready_seconds",
    "error",
)


def table(results: Results) -> str:
    """Return one line a row: its name and the numbers that matter."""
    lines = []
    for name, row in results.rows.items():
        shown = [
            f"{key} {row[key]:.4g}" if isinstance(row[key], float) else f"{key} {row[key]}"
            for key in SHOWN
            if key in row
        ]
        lines.append(f"{name:<60} {'  '.join(shown)}"[:200])
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("ours", "ledger", "peers", "engine"))
    parser.add_argument("--out", type=Path, required=True, help="rows, one JSON line each")
    parser.add_argument("--minutes", type=float, default=7, help="start no row after that")
    parser.add_argument("--again", action="store_true", help="run rows anew that failed")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or interpreter")
    shapes = "qwen3-0.6b,llama-3.2-1b,llama-3.1-8b"
    parser.add_argument("--shapes", default=shapes, help=", ".join(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 64, 256])
    parser.add_argument("--peer-batch", type=numbers, default=[1], help="of torch's decoders")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=numbers, default=[2048, 8192], help="of prefill steps")
    parser.add_argument("--forms", default="int8,int4,fp8", help="of the last shape, beside bf16")
    parser.add_argument("--seconds", type=float, default=40, help="of timing, a model of `ledger`")
    parser.add_argument("--ledgers", type=Path, default=FOLDER, help="folder of the GPUs' ledgers")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cases", type=int, default=len(CASES), help="models held to eager")
    parser.add_argument("--random", type=int, default=120, help="programs held to eager")
    parser.add_argument("--seed", type=int, default=0, help="of the random programs")
    parser.add_argument("--pages", type=int, default=gpu_ours.PAGES, help="of the KV pool")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--lengths", type=numbers, default=[100, 1024], help="in and out, from, to")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes.split(",")
    options.forms = [form for form in options.forms.split(",") if form]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    clock = Clock(options.device, options.repeats)
    results = Results(options.out, options.again)
    rows = {
        "ours": lambda: Ours(options, clock).rows(),
        "ledger": lambda: ledger_rows(options, clock),
        "peers": lambda: peer_rows(options, clock),
        "engine": lambda: engine_rows(options, clock),
    }
    done = run(rows[options.part](), results, options.minutes * 60)
    print(table(results))
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
