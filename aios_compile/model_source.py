"""Where a model comes from: a checkpoint (a folder, hub id or GGUF file), or an nn.Module."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aios_compile.checkpoint import hub
from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.gguf import SUFFIX, GgufCheckpoint, only_gguf
from aios_compile.checkpoint.tensors import Tensors
from aios_compile.checkpoint.tokenizer import GENERATION_CONFIG, Tokenizer
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError, ConfigError, RequestError
from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes, tied_parameters
from aios_compile.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor, nn

ORDER = "order"  # what a tensor's columns are called in names, as ir/stored_weights.py has it


@dataclass
class ModelSource:
    """A model that was opened and checked; nothing large has been read.

    build() makes the module to capture (torch is imported then); read(name) gives a weight.
    stored_forms() says which weights are stored quantised, in which format of ir/quant_format.py;
    read("name:format") gives the rows of those (ir/stored_weights.py). stored_orders() says whose
    order of columns those have that have one, read("name:order") gives it: int32 [K]. expanded()
    says, for the report, which are quantised in the files and not in memory, or in another order.
    """

    name: str
    build: Callable[[], nn.Module]
    read: Callable[[str], Tensor]
    flat: bool | None
    max_model_len: int
    model_eos_ids: tuple[int, ...]
    generation_config: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    load_tokenizer: Callable[[], Tokenizer | None] = lambda: None
    notes: tuple[str, ...] = ()
    stored_forms: Callable[[], Mapping[str, str]] = dict
    stored_orders: Callable[[], Mapping[str, str]] = dict
    expanded: Callable[[], tuple[str, ...]] = tuple

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Load it, once and not before: a start from the cache has the artefact's own copy."""
        return self.load_tokenizer()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's, then the model's."""
        own = self.tokenizer.eos_ids if self.tokenizer is not None else ()
        return tuple(dict.fromkeys((*own, *self.model_eos_ids)))


def open_source(model: Any, options: CompileOptions) -> ModelSource:
    """Open a folder, hub id, GGUF file or module. Raises CheckpointError or
    UnsupportedModelError.
    """
    if isinstance(model, (str, Path)):
        return _open_checkpoint(hub.resolve(model, options.local_files_only), options)
    return _open_module(model, options)


Checkpoint = CheckpointFolder | GgufCheckpoint


def _open_files(path: Path) -> Checkpoint:
    gguf = path if path.suffix == SUFFIX and not path.is_dir() else only_gguf(path)
    return CheckpointFolder.open(path) if gguf is None else GgufCheckpoint.open(gguf)


def _open_checkpoint(path: Path, options: CompileOptions) -> ModelSource:
    folder = _open_files(path)
    config = ModelConfig.from_dict(folder.config, str(folder.config_path))
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    dtype = _storage_dtype(config, folder, options)
    generation_eos = _check_generation_config(folder, config.vocab_size, path)

    def build() -> nn.Module:
        import torch

        from aios_compile.models.decoder import Decoder
        from aios_compile.models.fake import build_fake

        return build_fake(lambda: Decoder(config), getattr(torch, dtype))

    def read(name: str) -> Tensor:
        tensor, _, form = name.partition(":")
        if tensor not in known:
            raise KeyError(name)
        if form == ORDER:
            return _read_order(folder.weights, tensor)
        if form:
            return _read_rows(folder.weights, tensor, form)
        return _read_tensor(folder.weights, name, dtype)

    def stored_forms() -> dict[str, str]:
        forms = {name: folder.weights.stored_form(name) for name in folder.weights.names()}
        return {name: form for name, form in forms.items() if form}

    known = set(folder.weights.names())
    notes = [f"config key {key!r} has no meaning here" for key in config.ignored_keys]
    notes += _quantized_notes(folder.weights, dtype)
    return ModelSource(
        name=str(path),
        build=build,
        read=read,
        flat=True,
        max_model_len=max_model_len(config),
        model_eos_ids=(*generation_eos, *config.eos_token_ids),
        generation_config=folder.generation_config,
        files=tuple(folder.files()),
        load_tokenizer=lambda: _tokenizer(folder, options),
        notes=tuple(notes),
        stored_forms=stored_forms,
        stored_orders=lambda: _orders(folder.weights, stored_forms()),
        expanded=lambda: _expanded(folder.weights, stored_forms(), dtype),
    )


def _read_tensor(weights: Tensors, name: str, dtype: str) -> Tensor:
    """Return a checkpoint tensor as it is stored; a quantised one in `dtype`, piece by piece."""
    from aios_compile.codegen.pack_weights import from_numpy

    if not weights.is_quantized(name):
        return from_numpy(weights.read(name), weights.info(name).dtype)
    import torch

    values = torch.empty(weights.info(name).shape, dtype=getattr(torch, dtype))
    rows = values.view(-1, values.shape[-1])
    with _one_thread():
        for row, piece in weights.pieces(name):
            rows[row : row + len(piece)] = torch.from_numpy(piece)
    return values


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: pieces are small, and beside g++ its threads wait for each other.

    600 million weights of a Q4_K file were packed in 118 s with four threads on a busy machine with
    four cores, in 12 s with one.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_rows(weights: Tensors, name: str, form: str) -> Tensor:
    """Return the rows uint8 [N, row_bytes] of a quantised tensor, made piece by piece."""
    import torch

    from aios_compile.ir.quant_format import QuantFormat
    from aios_compile.ir.quantized import SCALE_DTYPES, QuantFields, pack_fields

    parsed = QuantFormat.parse(form)
    shape = weights.info(name).shape
    rows = torch.empty(shape[0], parsed.row_bytes(shape[1]), dtype=torch.uint8)
    with _one_thread():
        for row, part in weights.fields(name):
            parts = [
                None if p is None else torch.from_numpy(np.ascontiguousarray(p))
                for p in (
                    part.codes,
                    part.scales,
                    part.minimums,
                    part.super_scales,
                    part.super_minimums,
                )
            ]
            codes, scales, *rest = parts
            assert codes is not None and scales is not None
            scales = scales.to(SCALE_DTYPES.get(parsed.scales, torch.int8))
            rows[row : row + len(codes)] = pack_fields(parsed, QuantFields(codes, scales, *rest))
    return rows


def _read_order(weights: Tensors, name: str) -> Tensor:
    import torch

    order = weights.column_order(name)
    assert order is not None, f"the columns of {name} are in order"
    return torch.from_numpy(order)


def _orders(weights: Tensors, names: Iterable[str]) -> dict[str, str]:
    """Return, for each matrix of shuffled columns, the first one that has the same order."""
    found, first = dict[str, str](), dict[bytes, str]()
    for name in names:
        order = weights.column_order(name)
        if order is not None:
            found[name] = first.setdefault(order.tobytes(), name)
    return found


def _quantized_notes(weights: Tensors, dtype: str) -> list[str]:
    """Say in which formats weights are stored; nothing where none is quantised."""
    stored = weights.quantized_bytes()
    if not stored:
        return []
    return [
        f"the checkpoint stores weights as {', '.join(sorted(stored))}, {sum(stored.values())} "
        "bytes: linear layers and embeddings compute with the codes as they are "
        f"(keep_quantized_weights), what else reads them gets {dtype}"
    ]


def _expanded(weights: Tensors, forms: Mapping[str, str], dtype: str) -> tuple[str, ...]:
    """Say which quantised matrices no format of ir/quant_format.py holds, and what they take; and
    whose columns are held in another order.
    """
    lost = [n for n in weights.names() if weights.is_quantized(n) and n not in forms]
    orders = _orders(weights, forms)
    sorted_note = (
        f"{len(orders)} quantised weights have columns that are shuffled among the groups "
        f"(act-order): they are kept sorted by group, in {len(set(orders.values()))} different "
        "orders, and activations are read in those",
    ) * bool(orders)
    if not lost:
        return sorted_note
    count = sum(math.prod(weights.info(name).shape) for name in lost)
    size = 4 if dtype == "float32" else 2
    return (
        *sorted_note,
        f"{len(lost)} quantised weights are kept in {dtype}, {count * size:,} bytes: their groups "
        "are no multiple of 32 columns, or are shuffled (act-order) and of uneven sizes: "
        f"{', '.join(lost[:3])}" + (", ..." if len(lost) > 3 else ""),
    )


def max_model_len(config: ModelConfig) -> int:
    """Return the positions that the model knows: dynamic RoPE goes past the trained ones."""
    factor = config.rope.factor if config.rope.rope_type == "dynamic" else 1.0
    return int(config.max_position_embeddings * factor)


def _check_generation_config(folder: Checkpoint, vocab_size: int, path: Path) -> tuple[int, ...]:
    """Return the end tokens of generation_config.json; refuse what no request could use."""
    ids = _listed(folder.generation_config.get("eos_token_id"))
    for index in ids:
        if type(index) is not int or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{path / GENERATION_CONFIG}: eos_token_id is {repr(index)[:40]}, expected a token "
                f"id below vocab_size {vocab_size}"
            )
    try:
        SamplingParams.defaults_from(folder.generation_config)
    except RequestError as error:
        raise CheckpointError(f"{path}/{error.message}") from None
    return ids


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


_STORED: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16"}


def _storage_dtype(config: ModelConfig, folder: Checkpoint, options: CompileOptions) -> str:
    """Return how weights are kept: the option, the config's dtype, or the embedding's own.

    Beside quantised weights it is the narrowest that holds all others to the bit: GGUF files keep
    norms in float32, often a table in float16. Dequantised weights are rounded to it; float32 is
    exact for those too.
    """
    if options.dtype != "auto":
        return options.dtype
    if config.dtype is not None:
        return config.dtype
    weights = folder.weights
    if weights.quantized_bytes():
        plain = [name for name in weights.names() if not weights.is_quantized(name)]
        fitting = (d for d in ("bfloat16", "float16") if all(_holds(d, weights, n) for n in plain))
        return next(fitting, "float32")
    stored = weights.info("model.embed_tokens.weight").dtype
    return _STORED.get(stored, "float32")


def _holds(dtype: str, weights: Tensors, name: str) -> bool:
    """Say whether a dtype holds a tensor's values; of matrices only the stored dtype is looked at.

    NaN and infinite values are refused by name when they are packed.
    """
    info = weights.info(name)
    if _STORED.get(info.dtype) == dtype:
        return True
    if len(info.shape) != 1 or info.dtype not in ("F32", "F16"):
        return info.dtype not in weights.float_dtypes
    values = weights.read(name).astype(np.float32)
    values = values[np.isfinite(values)]
    if dtype == "bfloat16":
        return not np.any(values.view(np.uint32) & 0xFFFF)
    with np.errstate(over="ignore"):
        return bool(np.all(values.astype(np.float16).astype(np.float32) == values))


def _other_tokenizer(where: str, options: CompileOptions) -> Tokenizer:
    path = hub.resolve(where, options.local_files_only)
    gguf = path if path.is_file() else None
    return Tokenizer.load(path) if gguf is None else GgufCheckpoint.open(gguf).load_tokenizer()


def _tokenizer(folder: Checkpoint | None, options: CompileOptions) -> Tokenizer | None:
    """Return the one that the options name, else the folder's, if there are a folder and one."""
    if options.tokenizer is not None:
        return _other_tokenizer(options.tokenizer, options)
    return folder.load_tokenizer() if folder is not None and folder.has_tokenizer() else None


def _open_module(model: Any, options: CompileOptions) -> ModelSource:
    import torch
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a folder, a hub id or an nn.Module"
        )
    if options.dtype != "auto":
        raise ConfigError(
            f"dtype={options.dtype!r} with an nn.Module",
            advice=f"call model.to(torch.{options.dtype})",
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, nn.DataParallel):
        model = model.module
    module: nn.Module = model
    config = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    eos = _module_eos(config)
    state = dict(module.named_parameters(remove_duplicate=False))
    meta = [name for name, p in state.items() if p.is_meta]
    if meta:
        raise ConfigError(
            f"the module's parameter {meta[0]} has no values (it is on meta)",
            advice="load its weights first (to_empty, then load_state_dict)",
        )
    wide = [name for name, p in state.items() if p.dtype in (torch.float64, torch.complex128)]
    if wide:
        raise ConfigError(
            f"the module's parameter {wide[0]} is {str(state[wide[0]].dtype)[6:]}, expected "
            "float32, float16 or bfloat16",
            advice="call model.float()",
        )

    def read(name: str) -> torch.Tensor:
        return state[name].detach().contiguous()

    return ModelSource(
        name=type(module).__name__,
        build=lambda: module,
        read=read,
        flat=None,
        max_model_len=int(length or 4096),
        model_eos_ids=eos,
        load_tokenizer=lambda: _tokenizer(None, options),
    )


def _module_eos(config: Any) -> tuple[int, ...]:
    """Return a module's end tokens; refuse those that it has no logits for, before the compile."""
    eos, size = _listed(getattr(config, "eos_token_id", None)), getattr(config, "vocab_size", None)
    wrong = [i for i in eos if type(i) is not int or (size is not None and not 0 <= i < size)]
    if wrong:
        raise ConfigError(
            f"eos_token_id {wrong[0]} is out of the module's vocabulary of {size}",
            advice="set config.eos_token_id to a token id, or to None",
        )
    return eos
