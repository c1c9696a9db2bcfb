"""`aios quantize`: a model folder in, a smaller one out, its errors compensated on given text.

Layer by layer: the calibration windows reach a layer through the quantised layers before it, so
that later layers make up for what earlier ones lost (Frantar et al., 2022, section 4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aios_compile.checkpoint import paths
from aios_compile.checkpoint.folder import CONFIG, QUANTIZATION, CheckpointFolder
from aios_compile.checkpoint.json_file import read_json
from aios_compile.checkpoint.safetensors_header import ITEM_BYTES
from aios_compile.checkpoint.safetensors_writer import SafetensorsWriter
from aios_compile.checkpoint.weights import SINGLE
from aios_compile.codegen.cache import ArtefactCache, default_root
from aios_compile.codegen.cache_key import compiler_digest, hash_files
from aios_compile.codegen.pack_weights import from_numpy
from aios_compile.errors import CheckpointError, ConfigError
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import DecoderLayer
from aios_compile.models.parameters import EMBEDDING, parameter_shapes, tied_parameters
from aios_compile.progress import Progress
from aios_compile.quantize import packed_folder
from aios_compile.quantize.awq import scale_channels
from aios_compile.quantize.calibration import HiddenStates, load_layer, windows_of
from aios_compile.quantize.gptq import gptq, output_error
from aios_compile.quantize.scheme import Quantized, Scheme, round_to_nearest

METHODS = ("gptq", "awq")


@dataclass(frozen=True)
class MatrixReport:
    """One matrix: the relative error of its outputs on the calibration text, and to nearest."""

    name: str
    error: float
    error_to_nearest: float


@dataclass(frozen=True)
class QuantizeReport:
    """What was made. bits: a weight of all matrices but the embedding, those kept included.

    kept: the linear layers that stayed as they are, with the reason. cached: it was there already.
    """

    path: str
    method: str
    bits: float
    matrices: tuple[MatrixReport, ...]
    kept: tuple[tuple[str, str], ...]
    tokens: int
    key: str
    cached: bool = False

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantizeReport:
        rows = tuple(MatrixReport(**row) for row in data["matrices"])
        kept = tuple((str(name), str(reason)) for name, reason in data["kept"])
        return QuantizeReport(**{**data, "matrices": rows, "kept": kept})


def quantize_checkpoint(
    model: Path,
    out: Path,
    text: str,
    *,
    method: str = "gptq",
    scheme: Scheme = Scheme(),  # noqa: B008 - frozen
    samples: int = 128,
    context: int = 512,
    progress: Progress | None = None,
    cache_dir: str | None = None,
) -> QuantizeReport:
    """Write the folder `model` to `out` with 4- or 8-bit linears. Returns what it lost.

    text: of the kind that the model will read. Raises ConfigError, CheckpointError or
    UnsupportedModelError before anything is written; `out` appears when it is whole. The same
    request again finds its own folder and does nothing.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}, expected {' or '.join(METHODS)}")
    folder = _open(model)
    config = ModelConfig.from_dict(folder.config, str(folder.config_path))
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    stored = folder.weights.info(EMBEDDING).dtype
    scheme = replace(scheme, scales=torch.bfloat16 if stored == "BF16" else torch.float16)
    key = _key(folder, text, method, scheme, (samples, context), cache_dir)
    if (found := _made_already(out, key)) is not None:
        return found
    if not folder.has_tokenizer():
        raise CheckpointError(f"{model}: no tokenizer.json, the calibration text needs one")
    ids = folder.load_tokenizer().encode(text)
    windows = windows_of(ids, min(context, config.max_position_embeddings), samples)
    work = _Work(folder, config, scheme, method, progress or Progress(show=False))
    with packed_folder.new_folder(out) as staging, torch.no_grad():
        work.write(staging, windows)
        report = work.report(out, windows.numel(), key)
        record = json.dumps(asdict(report), indent=1)
        (staging / packed_folder.RECORD).write_text(record)
    return report


def _open(path: Path) -> CheckpointFolder:
    if path.is_file() or not path.is_dir():
        raise CheckpointError(f"{path}: not a folder, expected a model folder with safetensors")
    if paths.exists(path, CONFIG) and QUANTIZATION in read_json(paths.member(path, CONFIG)):
        raise CheckpointError(
            f"{path}: the model is quantised already (quantization_config)",
            advice="start from the unquantised checkpoint",
        )
    return CheckpointFolder.open(path)


def _key(
    folder: CheckpointFolder,
    text: str,
    method: str,
    scheme: Scheme,
    sizes: tuple[int, int],
    cache_dir: str | None,
) -> str:
    """Hash all that the result depends on."""
    memo = ArtefactCache(default_root(cache_dir)).memo()
    parts = [
        json.dumps(hash_files(folder.files(), memo), sort_keys=True),
        hashlib.sha256(text.encode()).hexdigest(),
        f"{method} {scheme} {sizes}",
        compiler_digest(),
    ]
    memo.save()
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _made_already(out: Path, key: str) -> QuantizeReport | None:
    try:
        data = json.loads((out / packed_folder.RECORD).read_text())
        same = data["key"] == key
        return replace(QuantizeReport.from_json(data), cached=True) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Work:
    """One run: the layers in order, each read, quantised and written."""

    def __init__(
        self,
        folder: CheckpointFolder,
        config: ModelConfig,
        scheme: Scheme,
        method: str,
        progress: Progress,
    ) -> None:
        self.folder, self.config, self.scheme, self.method = folder, config, scheme, method
        self.progress = progress
        self.rows: list[MatrixReport] = []
        self.kept: list[tuple[str, str]] = [("lm_head", "its rows decide the logits")]
        self.chosen = self._choose()

    def _choose(self) -> dict[str, tuple[int, int]]:
        """Return the linears to quantise: stem -> (N, K); note the others."""
        chosen: dict[str, tuple[int, int]] = {}
        with torch.device("meta"):
            layer = DecoderLayer(self.config, None)
        linears = [n for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        for i in range(self.config.num_hidden_layers):
            for name in linears:
                stem = f"model.layers.{i}.{name}"
                rows, depth = self.folder.weights.info(f"{stem}.weight").shape
                if depth % self.scheme.group:
                    reason = f"rows of {depth} values, no multiple of {self.scheme.group}"
                    self.kept.append((stem, reason))
                else:
                    chosen[stem] = rows, depth
        if not chosen:
            raise ConfigError(
                f"group={self.scheme.group}: {self.kept[-1][1]} in every layer",
                advice="a smaller --group",
            )
        return chosen

    def read(self, name: str) -> Tensor:
        """Return a parameter as float32, in memory of its own."""
        info = self.folder.weights.info(name)
        return from_numpy(self.folder.weights.read(name), info.dtype).to(torch.float32, copy=True)

    def write(self, target: Path, windows: Tensor) -> None:
        """Quantise layer by layer into the folder `target`."""
        scheme, count = self.scheme, self.config.num_hidden_layers
        packed_folder.copy_files(self.folder, target)
        ignored = [name for name, _ in self.kept]
        packed_folder.write_config(self.folder, target, scheme, ignored)
        shapes = packed_folder.shapes_of(self.folder, self.chosen, scheme)
        writer = SafetensorsWriter(target / SINGLE, shapes)
        states = HiddenStates(self.config, windows, self.read(EMBEDDING))
        done: set[str] = set()
        with self.progress.stage("quantize", count):
            for i in range(count):
                layer = load_layer(self.config, i, self.read)
                for name, matrix in self._layer(states, layer, f"model.layers.{i}").items():
                    for part, array in packed_folder.tensors_of(name, matrix, scheme).items():
                        writer.add(part, array)
                for name, value in layer.state_dict().items():  # AWQ changes norms and biases
                    whole = f"model.layers.{i}.{name}"
                    done.add(whole)
                    if whole in shapes:
                        dtype = from_numpy(self.folder.weights.read(whole), shapes[whole][0]).dtype
                        writer.add(whole, packed_folder.bits_of(value.to(dtype)))
                states.advance(layer)
                self.progress.update(i + 1, count)
        for name in sorted(self.folder.weights.names()):
            if name in shapes and name not in done:
                writer.add(name, self.folder.weights.read(name))
        writer.close()

    def _layer(
        self, states: HiddenStates, layer: DecoderLayer, prefix: str
    ) -> dict[str, Quantized]:
        """Quantise the linears of a layer in place; return their codes."""
        hessians = states.hessians(layer)
        parts = dict(layer.named_modules())
        linears = {n: m for n, m in parts.items() if isinstance(m, nn.Linear)}
        chosen = {n: m for n, m in linears.items() if f"{prefix}.{n}" in self.chosen}
        nearest = {
            n: output_error(m.weight, self._nearest(m.weight), hessians[n])
            for n, m in chosen.items()
        }
        if self.method == "awq":
            norm = self.folder.weights.info(f"{prefix}.input_layernorm.weight").dtype
            stored = {"BF16": torch.bfloat16, "F16": torch.float16}.get(norm, torch.float32)
            scale_channels(layer, hessians, self.scheme, stored)
        found = {}
        for name, linear in chosen.items():
            weight, hessian = linear.weight.data, hessians[name]
            if self.method == "gptq":
                matrix = gptq(weight, hessian, self.scheme)
            else:
                matrix = round_to_nearest(weight, hessian.diagonal().float(), self.scheme)
            error = output_error(weight, matrix.values(), hessian)
            self.rows.append(MatrixReport(f"{prefix}.{name}", error, nearest[name]))
            linear.weight.data = matrix.values()
            found[f"{prefix}.{name}"] = matrix
        return found

    def _nearest(self, weight: Tensor) -> Tensor:
        equal = torch.ones(weight.shape[1])
        return round_to_nearest(weight, equal, self.scheme).values()

    def report(self, out: Path, tokens: int, key: str) -> QuantizeReport:
        """Return what was done; the mean bits count every matrix but the embedding."""
        bits = weights = 0.0
        for name, shape in parameter_shapes(self.config).items():
            stem = name.removesuffix(".weight")
            if len(shape) != 2 or name == EMBEDDING:
                continue
            weights += prod(shape)
            if stem in self.chosen:
                bits += shape[0] * self.scheme.row_bits(shape[1])
            else:
                source = tied_parameters(self.config).get(name, name)
                bits += 8 * ITEM_BYTES[self.folder.weights.info(source).dtype] * prod(shape)
        kept, rows = tuple(self.kept), tuple(self.rows)
        return QuantizeReport(str(out), self.method, bits / weights, rows, kept, tokens, key)
