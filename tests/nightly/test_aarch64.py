"""Every kernel of a tiny model for aarch64: cross-compiled, run under qemu, the portable bits.

A processor with dotprod and one without; whatever else a kernel used would end it there with an
illegal instruction. Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu,
qemu-user).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_compile.codegen.cpp import build
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.study.cpu_compile import plan_for
from aios_compile.study.kernel_check import Kernels, prepare
from aios_compile.study.verify_override import sample_calls
from tests import zoo
from tests.codegen.emulated import EmulatedKernels, skip_unless_runnable

SETTINGS: list[dict[str, Any]] = [
    {},
    {"quantization": "int8"},
    {"quantization": "int4", "kv_cache_dtype": "int8", "quantize_embeddings": True},
]
WIDTH = 8  # pages of a table


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["neondot", "neon"])
def test_all_kernels_give_the_portable_bits(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    skip_unless_runnable(name)
    target, portable = build.Target.named(name), build.Target.named("portable")
    planned = plan_for(zoo.make("qwen3_gqa", tmp_path, "bfloat16"), target, settings)
    module, emitted = planned.module, planned.emitted
    wanted = sorted(set(emitted.by_call.values()))
    here = Kernels(emitted.sources, tmp_path / "here", target=portable)
    there = EmulatedKernels(emitted.sources, target, tmp_path / "there")
    weights = RandomWeights.of(planned.captured, 0)
    weights.learn(module)
    found = set()
    for tokens in (1, 19):
        calls = sample_calls(module, emitted, wanted, weights, tokens, WIDTH)
        found |= set(calls)
        for index, sample in calls.items():
            ours, theirs = (
                prepare(sample.call, emitted, sample.values, sample.sizes) for _ in range(2)
            )
            ours.run(here)
            there.run(index, theirs.sizes, theirs.arrays)
            for a, b in zip(ours.results, theirs.results):
                assert np.array_equal(a[0], b[0]), f"{emitted.sources[index].name}, {tokens} tokens"
    here.close()
    assert found == set(wanted)


def test_a_stranger_compiles_a_model_for_aarch64(tmp_path: Path) -> None:
    skip_unless_runnable("neondot")
    path, out = zoo.make("qwen3_gqa", tmp_path, "bfloat16"), tmp_path / "out"
    command = [sys.executable, "-m", "aios_compile.cli.main", "compile", str(path), "--json"]
    command += ["--target", "cpu:neondot", "--dump", str(out), "--quantization", "int4"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["target"] == "neondot" and "aarch64" in report["compiler"]
    assert (out / "lib.so").read_bytes()[18] == 183  # e_machine of ELF: EM_AARCH64
    for kernel in report["kernels"]:
        assert (out / "kernels" / f"{kernel['name']}.cpp").exists() and kernel["code_bytes"] > 0
    assert (out / "include" / "prelude.h").exists() and (out / "step.cpp").exists()
