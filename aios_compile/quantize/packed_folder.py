"""A quantised model folder in the format compressed-tensors, "pack-quantized".

What the tensors mean stands in checkpoint/compressed_tensors.py, which reads them; vLLM and
transformers (with the package compressed-tensors) read them as well. The folder is written beside
its place and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aios_compile.checkpoint.folder import CONFIG, QUANTIZATION, CheckpointFolder
from aios_compile.checkpoint.json_file import read_json
from aios_compile.errors import CheckpointError
from aios_compile.quantize.scheme import Quantized, Scheme

RECORD = "aios_quantize.json"  # what the folder was made of, and how well it went
COPIED = (".json", ".jinja", ".txt", ".model", ".md")
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `path` when the body ends without an error.

    Raises CheckpointError where `path` has content already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already", advice="choose a folder of its own")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield staging
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def copy_files(source: CheckpointFolder, target: Path) -> None:
    """Copy what is no weight: the tokenizer, the generation config, the licence."""
    for entry in sorted(source.path.iterdir()):
        name = entry.name
        weights = name in (CONFIG, RECORD) or name.endswith((".index.json", ".safetensors"))
        if not weights and entry.is_file() and (entry.suffix in COPIED or name == "LICENSE"):
            shutil.copyfile(entry, target / name)


def write_config(
    source: CheckpointFolder, target: Path, scheme: Scheme, ignored: Sequence[str]
) -> None:
    """Write config.json with a quantization_config. ignored: the linears that are not quantised."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    config = read_json(source.config_path)
    config[QUANTIZATION] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def shapes_of(source: CheckpointFolder, chosen: Mapping[str, tuple[int, int]], s: Scheme) -> Shapes:
    """Return dtype and shape of every tensor of the new file. chosen: stem -> (N, K)."""
    found: Shapes = {}
    for name in sorted(source.weights.names()):
        stem = name.removesuffix(".weight")
        if stem not in chosen:
            info = source.weights.info(name)
            found[name] = info.dtype, info.shape
            continue
        rows, depth = chosen[stem]
        groups, per_word = depth // s.group, 32 // s.bits
        found[f"{stem}.weight_packed"] = "I32", (rows, depth // per_word)
        found[f"{stem}.weight_scale"] = DTYPES[s.scales], (rows, groups)
        found[f"{stem}.weight_shape"] = "I64", (2,)
        if not s.symmetric:
            found[f"{stem}.weight_zero_point"] = "I32", (-(-rows // per_word), groups)
    return found


def tensors_of(stem: str, matrix: Quantized, scheme: Scheme) -> dict[str, NDArray[Any]]:
    """Return the tensors of a quantised matrix, bfloat16 as bits."""
    codes = matrix.codes.numpy()
    found: dict[str, NDArray[Any]] = {
        f"{stem}.weight_packed": words(codes, scheme.bits),
        f"{stem}.weight_scale": bits_of(matrix.scales),
        f"{stem}.weight_shape": np.array(codes.shape, np.int64),
    }
    if not scheme.symmetric:
        zeros = matrix.zeros.numpy().T
        padded = np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (32 // scheme.bits))))
        found[f"{stem}.weight_zero_point"] = np.ascontiguousarray(words(padded, scheme.bits).T)
    return found


def words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack codes along the last axis into int32 words, the lowest bits first."""
    if bits == 4:
        codes = np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4), dtype=np.uint8)
    return np.ascontiguousarray(codes).view(np.int32)


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as numpy; bfloat16 as its 16-bit patterns."""
    tensor = tensor.contiguous()
    array = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    result: NDArray[Any] = array.numpy()
    return result
