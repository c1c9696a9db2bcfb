"""Decode, prefill and starts on this machine, side by side with transformers, one run.

    python -m benchmarks.cpu --shape qwen3-0.6b [--rounds 9] [--quantization int8,int4]

Quantised rows are held against the time that reading their own bytes takes.

Correctness is checked before any time is printed. Bandwidth, ours and the peer take turns; median
ratios and shares are reported with their spread. The bandwidth is the better of the readings just
before and just after, so that a share is never flattered by a machine that was busy at the probe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aios_compile
from benchmarks.bandwidth import BandwidthProbe
from benchmarks.shapes import make

PROMPT_TOKENS, DECODE_TOKENS = 64, 16


def prompt_ids(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """Return random token ids below the tokenizer's vocabulary."""
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(3, min(vocab_size, 1000), count)]


def weight_bytes(model: Any) -> int:
    """Return the bytes that one decode step must read: every packed weight once."""
    packed = [w for w in model.program.weights if w.packed or len(w.shape) == 1]
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
    return sum(int(np.prod(w.shape)) * sizes[w.dtype] for w in packed)


def ours_decode(model: Any, ids: list[int]) -> float:
    """Return seconds a token of greedy decoding at batch 1, the runtime included."""
    result = model.generate(ids, max_tokens=DECODE_TOKENS + 1, temperature=0, ignore_eos=True)
    metrics = result.metrics
    return float(metrics.total_us - metrics.ttft_us) / DECODE_TOKENS / 1e6


def transformers_decode(peer: Any, ids: list[int]) -> float:
    """Return seconds a token of greedy decoding at batch 1 with a dynamic cache."""
    with torch.no_grad():
        out = peer(input_ids=torch.tensor([ids]), use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            out = peer(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - begin) / DECODE_TOKENS


def check_correct(model: Any, peer: Any, ids: list[int]) -> float:
    """Return the largest logit difference to float32 transformers over the largest logit."""
    with torch.no_grad():
        want = peer(input_ids=torch.tensor([ids])).logits[0]
    got = model(torch.tensor(ids))
    return float((got - want).abs().max() / want.abs().max())


def rounds(
    ours: Callable[[], float],
    peer: Callable[[], float],
    floor_seconds: Callable[[], float],
    count: int,
) -> dict[str, Any]:
    """Run floor, ours and peer in turn; return medians, ratio (peer / ours) and share of floor."""
    a, b, shares = [], [], []
    for _ in range(count):
        before = floor_seconds()
        a.append(ours())
        shares.append(min(before, floor_seconds()) / a[-1])
        b.append(peer())
    ratios = sorted(y / x for x, y in zip(a, b))
    return {
        "ours_ms": 1e3 * statistics.median(a),
        "peer_ms": 1e3 * statistics.median(b),
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "share_of_bandwidth": statistics.median(shares),
        "share_spread": [min(shares), max(shares)],
        "rounds": count,
    }


def shares(ours: Callable[[], float], floor: Callable[[], float], count: int) -> dict[str, Any]:
    """Return ours in milliseconds and the floor over ours, medians and spread of `count` rounds."""
    times, found = [], []
    for _ in range(count):
        before = floor()
        times.append(ours())
        found.append(min(before, floor()) / times[-1])
    return {
        "ours_ms": 1e3 * statistics.median(times),
        "share_of_bandwidth": statistics.median(found),
        "share_spread": [min(found), max(found)],
        "rounds": count,
    }


def quantized_rows(folder: Path, cache: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return decode and prefill of each quantisation: logits near bf16's are checked first."""
    result: dict[str, Any] = {}
    given = {"cache_dir": cache, "num_threads": args.threads, "max_model_len": 2048}
    plain = aios_compile.load_and_compile(folder, progress=False, **given)
    ids = prompt_ids(plain.limits.vocab_size, PROMPT_TOKENS)
    want = plain(torch.tensor(ids))
    plain.close()
    for name in args.quantization.split(","):
        model = aios_compile.load_and_compile(folder, quantization=name, progress=False, **given)
        error = float((model(torch.tensor(ids)) - want).norm() / want.norm())
        assert error < (0.1 if "8" in name[:5] else 0.6), f"{name}: logits differ by {error:.2f}"
        probe, moved = BandwidthProbe(args.threads), weight_bytes(model)
        ours_decode(model, ids)
        result[name] = {
            "logit_error": error,
            "bytes_a_token": moved,
            "decode": shares(
                lambda m=model: ours_decode(m, ids),  # type: ignore[misc]
                lambda b=moved, p=probe: b / p.measure(),  # type: ignore[misc]
                args.rounds,
            ),
            "prefill_256_tokens_s": statistics.median(
                prefill_tokens_a_second(model, prompt_ids(1000, 256, seed)) for seed in range(5)
            ),
        }
        model.close()
    return result


def start_seconds(folder: Path, cache: Path) -> dict[str, float]:
    """Return the seconds of a whole process to its first token: nothing cached, then cached."""
    command = [sys.executable, "-m", "aios_compile.cli.main", "generate", str(folder), "ROMEO:"]
    command += ["--max-tokens", "1", "--temperature", "0"]
    env = {**os.environ, "AIOS_CACHE_DIR": str(cache)}
    result = {}
    for name, repeats in (("nothing_cached", 1), ("cached", 5)):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run(command, env=env, check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        result[name] = statistics.median(times)
    return result


def prefill_tokens_a_second(model: Any, ids: list[int]) -> float:
    """Return tokens a second of a prompt, to its first token."""
    begin = time.perf_counter()
    model.generate(ids, max_tokens=1, temperature=0, ignore_eos=True)
    return len(ids) / (time.perf_counter() - begin)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    folder = make(args.shape, Path(args.folder or Path(tempfile.gettempdir()) / args.shape))
    result: dict[str, Any] = {"shape": args.shape, "threads": args.threads}
    with tempfile.TemporaryDirectory() as cache:
        if args.starts:
            result["start_seconds"] = start_seconds(folder, Path(cache))
        model = aios_compile.load_and_compile(
            folder, cache_dir=cache, num_threads=args.threads, max_model_len=2048, progress=False
        )
        ids = prompt_ids(model.limits.vocab_size, PROMPT_TOKENS)
        probe, moved = BandwidthProbe(args.threads), weight_bytes(model)
        result["read_gb_s"] = max(probe.measure() for _ in range(7)) / 1e9
        result["bytes_a_token"] = moved
        result["decode"] = {}
        for name in ("float32", "bfloat16"):
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
            if name == "float32":
                result["relative_logit_error"] = check_correct(model, peer, ids)
                assert result["relative_logit_error"] < 0.02, result
            transformers_decode(peer, ids)
            result["decode"][name] = rounds(
                lambda: ours_decode(model, ids),
                lambda p=peer: transformers_decode(p, ids),  # type: ignore[misc]
                lambda: moved / probe.measure(),
                args.rounds,
            )
            del peer
        result["prefill_256_tokens_s"] = statistics.median(
            prefill_tokens_a_second(model, prompt_ids(1000, 256, seed)) for seed in range(5)
        )
        model.close()
        if args.quantization:
            result["quantized"] = quantized_rows(folder, cache, args)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--folder", help="where the random checkpoint is kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quantization", default="", help="also these, e.g. int8,int4")
    parser.add_argument("--starts", action="store_true", help="also measure whole-process starts")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
