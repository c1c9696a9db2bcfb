"""A quantised checkpoint stays quantised in memory: what a process that serves it has resident.

Measured as the system counts it (Rss of /proc/self/smaps_rollup), in a process that starts from the
artefact, so without torch, and has answered: every weight has been read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

import aios_compile
from aios_compile.checkpoint.gguf_header import read_gguf_header
from aios_compile.checkpoint.safetensors_header import read_header
from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes
from tests import zoo
from tests.formats.gguf_files import convert
from tests.formats.packed_folders import LINEARS

MOST = 1.1
POOL = 1 << 20
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
         "num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 4096}  # fmt: skip
zoo.ZOO["llama_resident"] = SIZES
GROUP = 64
OPTIONS: dict[str, Any] = {"progress": False, "num_threads": 2, "kv_cache_memory_bytes": POOL}
CHILD = """
import re, sys
from pathlib import Path
import aios_compile
from aios_compile.runtime import weight_memory

def resident():
    found = re.search(r"Rss:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) << 10

def answer(path):
    model = aios_compile.load_and_compile(path, **{options})
    model.generate([1, 2, 3], max_tokens=3, ignore_eos=True)
    return model

answer(sys.argv[1]).close()  # imports, code, the allocator's reserve
before = resident()
if sys.argv[3] == "huge":
    weight_memory.LEAST_BYTES = 0
model = answer(sys.argv[2])
if sys.argv[3] == "huge":
    model._opened.memory._thread.join()
    assert model._opened.memory.in_huge_pages
after = resident()
assert "torch" not in sys.modules
print(after - before - model.memory_plan.arena_bytes - {pool})
"""


def words(*shape: int) -> torch.Tensor:
    """Return random codes, eight of four bits in each word."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int64).to(torch.int32)


def gptq(stem: str, n: int, k: int) -> dict[str, torch.Tensor]:
    return {f"{stem}.qweight": words(k // 8, n), f"{stem}.qzeros": words(k // GROUP, n // 8),
            f"{stem}.scales": torch.full((k // GROUP, n), 0.004).half()}  # fmt: skip


def awq(stem: str, n: int, k: int) -> dict[str, torch.Tensor]:
    return gptq(stem, n, k) | {f"{stem}.qweight": words(k, n // 8)}


def compressed(stem: str, n: int, k: int) -> dict[str, torch.Tensor]:
    return {f"{stem}.weight_packed": words(n, k // 8),
            f"{stem}.weight_scale": torch.full((n, k // GROUP), 0.004).half(),
            f"{stem}.weight_shape": torch.tensor([n, k])}  # fmt: skip


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "compressed": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                "config_groups": {"group_0": {"weights": WEIGHTS}}}),
}  # fmt: skip


def write(kind: str, source: Path, tmp_path: Path) -> tuple[Path, int]:
    """Write a checkpoint of the model; return it and the bytes of its tensors."""
    if kind not in FOLDERS:
        path = tmp_path / "model.gguf"
        convert(source, path, lambda _: Kind[kind])
        infos = read_gguf_header(path).tensors.values()
        return path, sum(info.end - info.begin for info in infos)
    make, settings = FOLDERS[kind]
    values = zoo.config_of("llama_resident", "float16")
    tensors: dict[str, torch.Tensor] = {}
    old = load_file(source / "model.safetensors")
    for name, shape in parameter_shapes(ModelConfig.from_dict(values)).items():
        stem = name.removesuffix(".weight")
        packed = stem.rpartition(".")[2] in LINEARS
        tensors |= make(stem, *shape) if packed else {name: old[name].half()}
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    save_file(tensors, path / "model.safetensors")
    infos = read_header(path / "model.safetensors").values()
    return path, sum(info.end - info.begin for info in infos)


@pytest.mark.parametrize("pages", ["mapped", "huge"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_resident_weights(
    kind: str, pages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOS_VERIFY", "0")
    torch.manual_seed(0)
    tiny = zoo.make("llama_gqa", tmp_path)
    path, held = write(kind, zoo.make("llama_resident", tmp_path, "float16"), tmp_path)
    for each in (tiny, path):
        aios_compile.load_and_compile(each, **OPTIONS).close()
    code = CHILD.format(options=repr(OPTIONS), pool=POOL)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny), str(path), pages], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    print(f"{kind} {pages}: {taken / held:.3f} of {held / 1e6:.1f} MB")
    whole = HUGE_PAGE if pages == "huge" else 0  # the last page is taken whole
    assert 0.85 * held < taken <= MOST * held + whole
