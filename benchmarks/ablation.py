"""What each optional pass is worth: launches, bytes and nodes counted, decode and prefill timed.

    python -m benchmarks.ablation [MODEL] [--tokens 64] [--rounds 5]

Every variant is compiled first; the timed rounds visit all variants in turn, so that a change of
the machine's speed hits all alike. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aios_compile
from aios_compile.capture.capture import capture
from aios_compile.config import CompileOptions
from aios_compile.errors import PassError
from aios_compile.model_source import open_source
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE, STAGES
from aios_compile.study.ablation import ablate


def decode_us(model: Any, tokens: int) -> float:
    """Return microseconds a token of greedy decoding at batch 1."""
    ids = [5, 17, 33, 8]
    metrics = model.generate(ids, max_tokens=tokens, temperature=0, ignore_eos=True).metrics
    return float(metrics.total_us - metrics.ttft_us) / (tokens - 1)


def prefill_us(model: Any, tokens: int) -> float:
    """Return microseconds a token of a prompt of `tokens` random ids."""
    ids = [(i * 7919) % 1000 + 3 for i in range(tokens)]
    return float(model.generate(ids, max_tokens=1, temperature=0).metrics.ttft_us) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="examples/shakespeare")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    source = open_source(args.model, CompileOptions())
    captured = capture(source.build(), flat=source.flat)
    print(ablate(captured, STAGES, PassOptions()))
    names = ["", *(info_of(p).name for p in PIPELINE if not info_of(p).required)]
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        models: dict[str, Any] = {}
        for name in names:
            try:
                models[name] = stack.enter_context(
                    aios_compile.load_and_compile(
                        Path(args.model),
                        disable_passes=(name,) if name else (),
                        cache_dir=cache,
                        num_threads=args.threads,
                        progress=False,
                    )
                )
            except PassError as error:
                print(f"without {name}: {error.message}")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                times[name].append((decode_us(model, args.tokens), prefill_us(model, 256)))
    print(f"\n{'without':<34}{'decode us a token':>20}{'prefill us a token':>20}")
    for name, rows in times.items():
        decode, prefill = (statistics.median(column) for column in zip(*rows))
        print(f"{name or '(all passes)':<34}{decode:>20.1f}{prefill:>20.1f}")


if __name__ == "__main__":
    main()
