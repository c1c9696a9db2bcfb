"""Weight files: every kind of damage is a CheckpointError that names file and tensor, and cheap."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import CheckpointError
from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes, tied_parameters
from tests import zoo

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
ENTRY_A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ENTRY_B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def write(path: Path, header: Any, data: bytes = bytes(32), size: int | None = None) -> Path:
    """Write a safetensors file with any header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = WeightFiles.open(tmp_path)
    assert sorted(weights.names()) == ["a", "b"]
    assert np.array_equal(weights.read("a"), A) and np.array_equal(weights.read("b"), B)
    assert weights.info("a").dtype == "F32" and weights.info("a").shape == (2, 3)
    with pytest.raises(ValueError, match="read-only"):
        weights.read("a")[0, 0] = 1
    with pytest.raises(CheckpointError, match="'c' is missing"):
        weights.read("c")
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    odd = write(tmp_path / "odd", json.dumps({"x": entry}).encode() + b" " * 1, bits.tobytes())
    array = WeightFiles.open(odd).read("x")  # bfloat16 arrives as its bits, and aligned
    assert np.array_equal(array, bits) and array.flags.aligned


HEADERS: list[tuple[Any, str]] = [
    (b"", "not valid JSON"),
    (b"[]", "JSON object"),
    (b'{"a": 1}', "'a'"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"a":' * 5000, "nested too deeply|not valid JSON"),
    (b'{"a": {}, "a": {}}', "'a' stands twice"),
    ({"a": ENTRY_A}, "8 bytes after"),
    ({"a": ENTRY_A, "b": {**ENTRY_B, "data_offsets": [16, 24]}}, "'b' overlaps"),
    ({"a": ENTRY_A, "b": {**ENTRY_B, "data_offsets": [28, 36]}}, "'b' follows a hole"),
    ({"a": {**ENTRY_A, "data_offsets": [8, 32]}}, "'a' follows a hole"),
    ({"a": ENTRY_A, "b": ENTRY_A}, "overlaps"),
    ({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, "truncated.*'a'.*ends at"),
    ({"a": {**ENTRY_A, "dtype": "F31"}}, "unknown dtype 'F31'"),
    ({"a": {**ENTRY_A, "dtype": ["F32"]}}, "unknown dtype"),
    ({"a": {**ENTRY_A, "shape": [2, 4]}}, "takes 32 bytes, data_offsets give 24"),
    ({"a": {**ENTRY_A, "shape": [1 << 62, 1 << 62]}}, "takes"),
    ({"a": {**ENTRY_A, "shape": [1 << 70]}}, "not a list of sizes"),
    ({"a": {**ENTRY_A, "shape": [-2, -3]}}, "not a list of sizes"),
    ({"a": {**ENTRY_A, "shape": [2.0, 3]}}, "not a list of sizes"),
    ({"a": {**ENTRY_A, "shape": [1] * 64}}, "not a list of sizes"),
    ({"a": {**ENTRY_A, "data_offsets": [24, 0]}}, "not \\[begin, end\\]"),
    ({"a": {**ENTRY_A, "data_offsets": [0]}}, "not \\[begin, end\\]"),
    ({"a": {**ENTRY_A, "data_offsets": [-8, 16]}}, "not \\[begin, end\\]"),
    ({"a": {"dtype": "F32", "shape": [8]}}, "not dtype, shape and data_offsets"),
    ({"a": {**ENTRY_A, "code": "x"}}, "not dtype, shape and data_offsets"),
]


@pytest.mark.parametrize("header, reason", HEADERS)
def test_damaged_headers(header: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        WeightFiles.open(write(tmp_path, header))
    assert "model.safetensors" in str(caught.value)


def test_header_sizes(tmp_path: Path) -> None:
    for size in (41, 1 << 40, (1 << 64) - 1):
        with pytest.raises(CheckpointError, match="truncated"):
            WeightFiles.open(write(tmp_path, b"{}", size=size))
    (tmp_path / "model.safetensors").write_bytes(b"\0\0\0")
    with pytest.raises(CheckpointError, match="truncated"):
        WeightFiles.open(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:  # sparse: takes no space
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_100)
    with pytest.raises(CheckpointError, match="200000000 bytes, at most 16777216"):
        WeightFiles.open(tmp_path)


def test_flips_and_truncations_of_a_header(tmp_path: Path) -> None:
    """A damaged header is either refused, or means other tensors that still tile the file."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": A for i in range(48)}
    save_file(tensors, tmp_path / "model.safetensors")
    good = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    assert header_bytes > 4096
    chooser = random.Random(0)
    cases = [good[:n] for n in chooser.sample(range(len(good)), 300)]
    for at in [*range(8), *chooser.sample(range(8, header_bytes), 700)]:
        flipped = bytearray(good)
        flipped[at] ^= 1 << chooser.randrange(8)
        cases.append(bytes(flipped))
    refused = 0
    tracemalloc.start()
    for case in cases:
        (tmp_path / "model.safetensors").write_bytes(case)
        try:
            weights = WeightFiles.open(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            assert sum(weights.read(name).nbytes for name in weights.names()) == 48 * A.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert refused > 650  # what passes is a flip inside a name


def shard(folder: Path, weight_map: Any, **tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """Write shards (`one` becomes one.safetensors) and their index."""
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    both = {"a": "one.safetensors", "b": "two.safetensors"}
    weights = WeightFiles.open(shard(tmp_path, both, one={"a": A}, two={"b": B}))
    assert np.array_equal(weights.read("b"), B) and len(weights.files) == 3
    for weight_map, reason in [
        ({**both, "c": "two.safetensors"}, "'c' of the index is missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' of the index is missing"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "'a' of the index is missing"),
        ({**both, "c": "three.safetensors"}, "three.safetensors: missing"),
        ({"b": "two.safetensors", "a": "two.safetensors"}, "missing"),
        ({**both, "c": "../x.safetensors"}, "not a plain file name"),
        ({**both, "c": "\ud800.safetensors"}, "not a plain file name"),
        ({**both, "c": "/etc/x.safetensors"}, "not a plain file name"),
        ({**both, "c": "sub/x.safetensors"}, "not a plain file name"),
        ({**both, "c": "pytorch_model.bin"}, "expected a .safetensors file"),
        ({**both, "c": 3}, "expected a .safetensors file"),
        ([], "weight_map"),
        ({}, "weight_map"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            WeightFiles.open(shard(tmp_path, weight_map))
    with pytest.raises(CheckpointError, match="holds tensor 'b', the index says 'one"):
        twice = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
        WeightFiles.open(shard(tmp_path, twice, one={"a": A, "b": B}, two={"b": B, "c": B}))


def change_tensors(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"
OLD_ROPE = "model.layers.0.self_attn.rotary_emb.inv_freq"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("llama_mha", lambda t: t.pop(UP), f"'{UP}' is missing"),
        ("llama_mha", lambda t: t.update(extra=A), "'extra' is not part of this model"),
        ("llama_mha", lambda t: t.update({UP: t[UP].T.copy()}), r"shape \[64, 96\], expected \[96"),
        ("llama_mha", lambda t: t.update({UP: t[UP].astype(np.int8)}), "dtype I8, expected F32"),
        ("llama_mha", lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        ("llama_tied", lambda t: t.update({"lm_head.weight": t[EMBED] + 1}), "differs from"),
        ("llama_tied", lambda t: t.update({"lm_head.weight": A}), r"expected \[128"),
        ("llama_tied", lambda t: t.update({"lm_head.weight": t[EMBED]}), None),
        ("llama_mha", lambda t: t.update({"model.rotary_emb.inv_freq": A}), None),
        ("llama_mha", lambda t: t.update({OLD_ROPE: A}), None),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_config(
    name: str, change: Any, reason: str | None, tmp_path: Path
) -> None:
    path = zoo.make(name, tmp_path)
    change_tensors(change, path)
    folder = CheckpointFolder.open(path)
    config = ModelConfig.from_dict(folder.config)
    arguments = parameter_shapes(config), tied_parameters(config)
    if reason is None:
        folder.weights.check(*arguments)
        return
    with pytest.raises(CheckpointError, match=reason) as caught:
        folder.weights.check(*arguments)
    assert "model.safetensors" in str(caught.value)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"\x80\x04")
        with pytest.raises(CheckpointError, match=rf"{name}: pickled.*\n.*convert"):
            WeightFiles.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        WeightFiles.open(tmp_path / "empty")


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    weights = WeightFiles.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="truncated since"):
        weights.read("b")
