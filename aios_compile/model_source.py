"""Where a model comes from: a checkpoint folder (or hub id), or an nn.Module in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_compile.checkpoint import hub
from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError
from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes, tied_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class ModelSource:
    """A model that was opened and checked; nothing large has been read.

    build() makes the module to capture (torch is imported then); read(name) gives a weight.
    """

    name: str
    build: Callable[[], nn.Module]
    read: Callable[[str], Tensor]
    flat: bool | None
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    generation_config: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()


def open_source(model: Any, options: CompileOptions) -> ModelSource:
    """Open a folder, hub id or module. Raises CheckpointError or UnsupportedModelError."""
    if isinstance(model, (str, Path)):
        return _open_folder(hub.resolve(model, options.local_files_only), options)
    return _open_module(model, options)


def _open_folder(path: Path, options: CompileOptions) -> ModelSource:
    folder = CheckpointFolder.open(path)
    config = ModelConfig.from_dict(folder.config, str(path / "config.json"))
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    dtype = _storage_dtype(config, folder, options)

    def build() -> nn.Module:
        import torch

        from aios_compile.models.decoder import Decoder
        from aios_compile.models.fake import build_fake

        return build_fake(lambda: Decoder(config), getattr(torch, dtype))

    def read(name: str) -> Tensor:
        from aios_compile.codegen.pack_weights import from_numpy

        if name not in known:
            raise KeyError(name)
        return from_numpy(folder.weights.read(name), folder.weights.info(name).dtype)

    known = set(folder.weights.names())
    tokenizer = _tokenizer(folder, options)
    eos = tokenizer.eos_ids if tokenizer is not None else ()
    notes = tuple(f"config key {key!r} has no meaning here" for key in config.ignored_keys)
    return ModelSource(
        name=str(path),
        build=build,
        read=read,
        flat=True,
        max_model_len=_max_model_len(config),
        eos_token_ids=tuple(dict.fromkeys((*eos, *_generation_eos(folder), *config.eos_token_ids))),
        generation_config=folder.generation_config,
        files=tuple(folder.files()),
        tokenizer=tokenizer,
        notes=notes,
    )


def _max_model_len(config: ModelConfig) -> int:
    """Return the positions that the model knows: dynamic RoPE goes past the trained ones."""
    factor = config.rope.factor if config.rope.rope_type == "dynamic" else 1.0
    return int(config.max_position_embeddings * factor)


def _generation_eos(folder: CheckpointFolder) -> tuple[int, ...]:
    value = folder.generation_config.get("eos_token_id")
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def _storage_dtype(config: ModelConfig, folder: CheckpointFolder, options: CompileOptions) -> str:
    """Return how weights are kept: the option, the config's dtype, or the embedding's own."""
    if options.dtype != "auto":
        return options.dtype
    if config.dtype is not None:
        return config.dtype
    stored = folder.weights.info("model.embed_tokens.weight").dtype
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")


def _tokenizer(folder: CheckpointFolder, options: CompileOptions) -> Tokenizer | None:
    if options.tokenizer is not None:
        return Tokenizer.load(hub.resolve(options.tokenizer, options.local_files_only))
    return folder.load_tokenizer() if folder.has_tokenizer() else None


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
    config = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    eos = getattr(config, "eos_token_id", None)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(hub.resolve(options.tokenizer, options.local_files_only))
    state = dict(model.named_parameters(remove_duplicate=False))
    meta = [name for name, p in state.items() if p.is_meta]
    if meta:
        raise ConfigError(f"the module's parameter {meta[0]} has no values (it is on meta)")

    def read(name: str) -> torch.Tensor:
        return state[name].detach()

    return ModelSource(
        name=type(model).__name__,
        build=lambda: model,
        read=read,
        flat=None,
        max_model_len=int(length or 4096),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        tokenizer=tokenizer,
    )
