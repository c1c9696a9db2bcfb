"""A GGUF file as a checkpoint: config, weights, tokenizer and sampling defaults from one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aios_compile.checkpoint import paths
from aios_compile.checkpoint.folder import CONFIG
from aios_compile.checkpoint.gguf_config import config_of, generation_config_of
from aios_compile.checkpoint.gguf_header import GgufHeader, read_gguf_header
from aios_compile.checkpoint.gguf_tokenizer import has_tokenizer, tokenizer_of
from aios_compile.checkpoint.gguf_weights import GgufWeights
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.errors import CheckpointError

SUFFIX = ".gguf"


class GgufCheckpoint:
    """What checkpoint.folder.CheckpointFolder is for a folder. Weights stay on disk until read."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self.config_path = header.path
        self.config: dict[str, Any] = config_of(header)
        self.generation_config: dict[str, Any] = generation_config_of(header)
        self.weights = GgufWeights(header, _permuted_heads(header, self.config))
        self._header = header

    @staticmethod
    def open(path: Path | str) -> GgufCheckpoint:
        """Read and check the header. Raises CheckpointError or UnsupportedModelError."""
        return GgufCheckpoint(read_gguf_header(Path(path)))

    def files(self) -> list[Path]:
        """Return every file that the compiled model depends on, for the cache key."""
        return [self.path]

    def has_tokenizer(self) -> bool:
        return has_tokenizer(self._header)

    def load_tokenizer(self) -> Tokenizer:
        """Build the tokenizer. Raises CheckpointError or UnsupportedModelError."""
        return tokenizer_of(self._header)


def only_gguf(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder without a config.json, None where there is none.

    Raises CheckpointError for several: which one is meant is for the user to say.
    """
    if paths.exists(folder, CONFIG):
        return None
    found = sorted(entry for entry in os.listdir(folder) if entry.endswith(SUFFIX))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: {len(found)} GGUF files: {', '.join(found[:5])}",
            advice="pass the path of one of them",
        )
    return paths.member(folder, found[0]) if found else None


def _permuted_heads(header: GgufHeader, config: dict[str, Any]) -> dict[str, int]:
    """Return whose rows the converter permuted: q and k of the architecture llama."""
    if header.metadata["general.architecture"] != "llama":
        return {}
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    return {
        f".self_attn.{part}_proj.{kind}": count
        for part, count in heads.items()
        for kind in ("weight", "bias")
    }
