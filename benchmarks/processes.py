"""Rows that take whole processes: starts to the first token, and memory above the baseline.

    python -m benchmarks.processes {ours,llama.cpp} MODEL WEIGHTS THREADS CACHE

is the child of the memory row: it loads, computes 80 tokens and prints what that took.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.interleaved import median_and_spread

PROMPT = "ROMEO:"
LOADED_TOKENS = 80  # in the KV cache when the memory is read


def starts(bench: Any, weights: str) -> dict[str, Any]:
    """Return seconds of a process to its first token: nothing cached once, then pairs, cached."""
    cache = bench.kept / "starts" / weights
    shutil.rmtree(cache, ignore_errors=True)
    ours = [sys.executable, "-m", "aios_compile.cli.main", "generate", str(bench.folder), PROMPT]
    ours += ["--max-tokens", "1", "--temperature", "0", "--num-threads", str(bench.threads)]
    ours += [] if weights == "bf16" else ["--quantization", weights]
    env = {**os.environ, "AIOS_CACHE_DIR": str(cache)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    nothing = _seconds(ours, env)
    calls: dict[str, Callable[[], float]] = {"ours": lambda: _seconds(ours, env)}
    if bench.has("llama.cpp"):
        theirs = [sys.executable, "-m", "benchmarks.peers.llama_cpp"]
        theirs += [str(bench.gguf(weights)), str(bench.threads)]
        calls["llama.cpp"] = lambda: _seconds(theirs, env)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(bench.args.rounds):
        for name, call in calls.items():
            times[name].append(call())
    shutil.rmtree(cache)
    found: dict[str, Any] = {"nothing_cached_seconds": nothing, "rounds": bench.args.rounds}
    found["seconds"] = median_and_spread(times.pop("ours"))
    found["peers"] = {
        name: {"seconds": median_and_spread(values)} for name, values in times.items()
    }
    return found


def memory(bench: Any, weights: str) -> dict[str, Any]:
    """Return resident bytes above those of a process that has only imported its engine."""
    cache = str(bench.cache)
    bench.ours(weights).close()  # the artefact is there now
    found: dict[str, Any] = _child("ours", bench.folder, weights, bench.threads, cache)
    kv = LOADED_TOKENS * bench.work.kv_bytes()
    found["kv_bytes"] = kv
    found["limit_bytes"] = 1.1 * (found["weight_bytes"] + kv)
    if bench.has("llama.cpp"):
        path = bench.gguf(weights)
        found["peers"] = {"llama.cpp": _child("llama.cpp", path, weights, bench.threads, cache)}
    return found


def _seconds(command: list[str], env: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    return time.perf_counter() - begin


def _child(*args: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.processes", *map(str, args)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split(":")[1].split() for line in lines}
    return {name: int(fields[name][0]) * 1024 for name in ("VmRSS", "VmHWM")}


def _ours(model: Path, weights: str, threads: int, cache: Path) -> dict[str, Any]:
    import numpy as np

    import aios_compile
    import aios_compile.api
    from benchmarks.ours import POOL_TOKENS, VECTOR_BYTES, max_positions

    before = _resident()["VmRSS"]
    loaded = aios_compile.load_and_compile(
        model, quantization=None if weights == "bf16" else weights, num_threads=threads,
        max_model_len=min(POOL_TOKENS, max_positions(model)), progress=False, cache_dir=str(cache),
    )  # fmt: skip
    assert "torch" not in sys.modules, "the artefact was not cached: run once more"
    ids = list(range(3, 67))
    loaded.generate(ids, max_tokens=LOADED_TOKENS - 64, temperature=0, ignore_eos=True)
    after = _resident()
    entries = loaded.program.weights
    held = sum(int(np.prod(w.shape)) * VECTOR_BYTES[w.dtype] for w in entries)
    loaded.close()
    return {
        "above_baseline_bytes": after["VmRSS"] - before,
        "peak_above_baseline_bytes": after["VmHWM"] - before,
        "baseline_bytes": before,
        "weight_bytes": held,
    }


def _llama(model: Path, weights: str, threads: int, cache: Path) -> dict[str, Any]:
    from benchmarks.peers.llama_cpp import LlamaCpp

    before = _resident()["VmRSS"]
    peer = LlamaCpp(model, threads).context(512)
    peer.decode(peer.hold([list(range(3, 67))]), LOADED_TOKENS - 64)
    after = _resident()
    return {
        "above_baseline_bytes": after["VmRSS"] - before,
        "peak_above_baseline_bytes": after["VmHWM"] - before,
        "baseline_bytes": before,
    }


if __name__ == "__main__":
    side, model, weights, threads, cache = sys.argv[1:]
    child = _ours if side == "ours" else _llama
    print(json.dumps(child(Path(model), weights, int(threads), Path(cache))))
