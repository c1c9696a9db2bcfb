"""The generated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of
their own: numpy and ctypes only, every operand an allocation of exactly its size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import (
    build,
    kv_write,
    linear,
    paged_attention,
    qk_norm_rope_kv_write,
    rope,
    sample,
)
from aios_compile.codegen.operand import dim_value
from tests.codegen import (
    test_kv_write,
    test_linear,
    test_paged_attention,
    test_quantized_linear,
    test_sample,
)
from tests.codegen.harness import make_body

FLAGS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RUNNER = """
import ctypes, json, sys
import numpy as np
class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "TSRP"]
library = ctypes.CDLL(sys.argv[1])
data = np.load(sys.argv[2])
for job in json.load(open(sys.argv[3])):
    arrays = [np.array(data[name]) for name in job["operands"]]
    arrays += [arrays[i] if isinstance(i, int) else np.full(i, 77, job["out_dtypes"][k])
               for k, i in enumerate(job["outs"])]
    spaces = [np.full(np.prod(shape) + 16, np.nan, np.float32) for shape in job["workspace"]]
    spaces = [s[-s.ctypes.data % 64 // 4 :] for s in spaces]  # as the plan places them
    p = (ctypes.c_void_p * (len(arrays) + len(spaces)))(
        *(a.ctypes.data for a in [*arrays, *spaces]))
    n = Sizes(**job["sizes"])
    for name in job["ranges"]:
        count = getattr(library, name + "_items")
        count.restype = ctypes.c_int64
        items = count(ctypes.byref(n), p)
        for i in range(3):
            getattr(library, name)(ctypes.byref(n), p, ctypes.c_int64(items * i // 3),
                                   ctypes.c_int64(items * (i + 1) // 3))
    for a in arrays:
        assert a.dtype.kind != "f" or job["poison"] or np.isfinite(a).all(), job["symbol"]
print("done")
"""


class Jobs:
    """Kernels, their operands, and what the other process is told."""

    def __init__(self):
        self.sources, self.data, self.jobs = {}, {}, []

    def add(self, source, sizes, inputs, outs, dtypes=(), poison=False):
        """outs: a shape, or the index of the input that the output aliases."""
        self.sources[source.symbol] = source
        names = []
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
                tensor = bits.numpy()
            names.append(f"a{len(self.data)}")
            self.data[names[-1]] = np.ascontiguousarray(tensor)
        job = {"symbol": source.symbol, "sizes": sizes, "operands": names, "outs": outs}
        job |= {"out_dtypes": list(dtypes) or ["float32"] * len(outs), "poison": poison}
        shapes = [[dim_value(d, sizes) for d in o.shape] for o in source.workspace]
        job |= {"workspace": shapes}
        job |= {"ranges": [source.symbol, *[f"{source.symbol}_finish"] * source.finishes]}
        self.jobs.append(job)


def add_linear(jobs):
    for function, rows, extra in (
        (test_linear.with_bias_and_residual, 37, ("bias", "residual")),
        (test_linear.gated, 96, ()),
        (test_linear.rounded_and_gated, 96, ()),
    ):
        shapes = {"bias": (rows,), "residual": ("T", rows)}
        inputs = {"x": (("T", 51), torch.float32), "w": ((rows, 51), torch.bfloat16)}
        inputs |= {name: (shapes[name], torch.float32) for name in extra}
        layout = test_linear.layout_of(function)
        body, operands = make_body(function, inputs, packed={"w": layout})
        source = linear.emit(linear.spec_of(body, operands))
        w = test_linear.packed(torch.randn(rows, 51).bfloat16(), layout)
        for tokens in (1, 3, 13):
            tail = [torch.randn(rows), torch.randn(tokens, rows)] if extra else []
            columns = rows if extra else rows // 2
            jobs.add(
                source, {"T": tokens}, [torch.randn(tokens, 51), w, *tail], [(tokens, columns)]
            )


def add_quantized_linear(jobs):
    rows, depth, name = 37, 544, "int4_g32_f16"
    _, _, source = test_quantized_linear.source_of(test_quantized_linear.plain, rows, depth, name)
    w = test_quantized_linear.packed(test_quantized_linear.random_rows(name, rows, depth), name)
    for tokens in (1, 3, 13):
        jobs.add(source, {"T": tokens}, [torch.randn(tokens, depth), w], [(tokens, rows)])


def add_attention(jobs):
    shape = (3, 1, 20, 13)
    for dtype, options in ((torch.float32, {"window": 19}), (torch.bfloat16, {"softcap": 3.0})):
        spec = test_paged_attention.spec_of(*shape, dtype, **options)
        batch = test_paged_attention.Batch(test_paged_attention.MIXED, *shape, dtype)
        inputs = batch.arguments()
        row = 5 * 20
        inputs[0] = torch.randn((batch.shape[0] - 1) * row + 3 * 20)  # ends with the last query
        sizes = {"T": batch.shape[0], "S": 5, "R": 1, "P": 6}
        source = paged_attention.emit(spec)
        jobs.add(source, sizes, inputs, [list(batch.shape)], poison=dtype == torch.float32)
    pages = 96
    for dtype, rounded in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.int8, True)):
        shape = (4, 2, 24, 64 if rounded else 40)
        spec = test_paged_attention.spec_of(*shape, dtype, pages=pages, rounded=rounded)
        batch = test_paged_attention.Batch(test_paged_attention.LONG, *shape, dtype, pages=pages)
        inputs, sizes = batch.arguments(), {"T": batch.shape[0], "S": 4, "R": 1, "P": pages}
        inputs[0] = torch.randn((batch.shape[0] - 1) * 8 * 24 + 4 * 24)
        poison = dtype == torch.int8  # scales of unused slots are NaN
        jobs.add(paged_attention.emit(spec), sizes, inputs, [list(batch.shape)], poison=poison)


def add_rope_and_writes(jobs):
    inputs = dict.fromkeys(("x",), (("T", 2, 7), torch.float32))
    inputs |= dict.fromkeys(("cos", "sin"), (("T", 6), torch.float32))
    body, operands = make_body(lambda x, c, s: torch.ops.aios.rope.default(x, c, s, True), inputs)
    source = rope.emit(rope.spec_of(body, operands))
    tables = [torch.randn(5, 6), torch.randn(5, 6)]
    jobs.add(source, {"T": 5}, [torch.randn(5, 2, 7), *tables], [(5, 2, 7)])
    row, page = 8 * 24, 16
    inputs = {
        "qkv": (("T", row), torch.float32),
        "qw": ((24,), torch.bfloat16),
        "kw": ((24,), torch.float32),
        "cos": (("T", 16), torch.float32),
        "sin": (("T", 16), torch.float32),
        "k_cache": ((2, 2, 24, page), torch.bfloat16),
        "v_cache": ((2, 2, page, 24), torch.bfloat16),
        "slots": (("T",), torch.int64),
    }
    body, operands = make_body(test_kv_write.fused_body(True, True, True), inputs)
    source = qk_norm_rope_kv_write.emit(qk_norm_rope_kv_write.spec_of(body, operands))
    values = [torch.randn(3, row), torch.randn(24).bfloat16(), torch.randn(24)]
    values += [torch.randn(3, 16), torch.randn(3, 16)]
    values += [torch.zeros(2, 2, 24, page).bfloat16(), torch.zeros(2, 2, page, 24).bfloat16()]
    jobs.add(source, {"T": 3}, [*values, torch.tensor([0, 17, 31])], [(3, 4, 24), 5, 6])


def add_write_of_codes(jobs):
    scales = ((2, 1, 32), torch.float32)
    inputs = {
        "k": (("T", 1, 7), torch.float32),
        "v": (("T", 1, 19), torch.float32),
        "k_cache": ((2, 1, 7, 32), torch.int8),
        "v_cache": ((2, 1, 32, 19), torch.int8),
        "k_scales": scales,
        "v_scales": scales,
        "slots": (("T",), torch.int64),
    }
    body, operands = make_body(test_kv_write.write_codes, inputs)
    source = kv_write.emit(kv_write.spec_of(body, operands))
    values = [torch.randn(3, 1, 7), torch.randn(3, 1, 19)]
    values += [torch.zeros(shape, dtype=dtype) for shape, dtype in list(inputs.values())[2:6]]
    jobs.add(source, {"T": 3}, [*values, torch.tensor([0, 17, 63])], [2, 3, 4, 5])


def add_sample(jobs):
    bad = [-1, 37, 2**40, -(2**62), 3]
    body, operands = test_sample.body_of(37)
    source = sample.emit(sample.spec_of(body, operands))
    inputs = test_sample.inputs_for(
        4, temperature=torch.tensor([0.0, 1.0, 0.5, 1.0]), top_p=torch.tensor([1, 0.9, 0.5, 0.0]),
        top_k=torch.tensor([0, 3, 100, 1]), logprob_counts=20, min_p=0.01,
        penalty=[[(t, 1) for t in bad]] * 4, bias=[[(t, 1.0) for t in bad]] * 4,
        allowed=[[], bad, [], bad], given_ids=2**50, has_given=torch.tensor([0, 0, 0, 1]),
    )  # fmt: skip
    outs = [(4,), (4,), (4,), (4, 20), (4, 20), (4,)]
    dtypes = ["int64", "float32", "int64", "int64", "float32", "int64"]
    jobs.add(source, {"R": 4}, [torch.randn(4, 37), *inputs], outs, dtypes, poison=True)


def run_sanitized(jobs, folder: Path) -> subprocess.CompletedProcess:
    compiler = build.find_compiler().path
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no libasan.so to preload")
    target = build.Target.host()
    sources = list(jobs.sources.values())
    objects = build.build_objects(sources, folder / "objects", target, extra_flags=FLAGS)
    library = build.link(objects, folder / "kernels.so", target, FLAGS)
    np.savez(folder / "data.npz", **jobs.data)
    (folder / "jobs.json").write_text(json.dumps(jobs.jobs))
    files = [str(library), str(folder / "data.npz"), str(folder / "jobs.json")]
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", RUNNER, *files]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path: Path):
    jobs = Jobs()
    adders = (add_linear, add_quantized_linear, add_attention, add_rope_and_writes)
    for add in (*adders, add_write_of_codes, add_sample):
        add(jobs)
    run = run_sanitized(jobs, tmp_path)
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-3000:]


def test_the_sanitizer_sees_a_planted_bug(tmp_path: Path):
    """A linear kernel that reads one k too many must be caught."""
    jobs = Jobs()
    add_linear(jobs)
    (symbol, source), *_ = jobs.sources.items()
    text = source.text.replace("constexpr int64_t K = 51;", "constexpr int64_t K = 52;")
    assert text != source.text
    jobs.sources = {symbol: dataclasses.replace(source, text=text)}
    jobs.jobs = jobs.jobs[:1]
    run = run_sanitized(jobs, tmp_path)
    assert run.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in run.stderr
