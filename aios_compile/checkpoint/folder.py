"""A Hugging Face model folder, opened and checked before anything large is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aios_compile.checkpoint import paths, tokenizer
from aios_compile.checkpoint.json_file import read_json
from aios_compile.checkpoint.packed_weights import PackedWeights
from aios_compile.checkpoint.tensors import Tensors
from aios_compile.checkpoint.tokenizer import GENERATION_CONFIG, Tokenizer
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import CheckpointError

CONFIG = "config.json"
QUANTIZATION = "quantization_config"


class CheckpointFolder:
    """The files of one model. Weights stay on disk until they are read through `weights`.

    config: config.json without the quantization_config, which `weights` honours.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        weights: Tensors,
    ) -> None:
        self.path = path
        self.config_path = path / CONFIG
        self.config = config
        self.generation_config = generation_config
        self.weights = weights

    @staticmethod
    def open(path: Path | str) -> CheckpointFolder:
        """Read config.json, generation_config.json and all weight headers. Raises
        CheckpointError.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder, expected a model folder")
        if not paths.exists(folder, CONFIG):
            raise CheckpointError(f"{folder}: no {CONFIG}, expected a Hugging Face model folder")
        config = read_json(paths.member(folder, CONFIG))
        if config.get("auto_map"):
            raise CheckpointError(
                f"{folder / CONFIG}: auto_map asks for model code of the folder, never run",
                advice="use a checkpoint of a known family, or build the nn.Module and pass that",
            )
        generation = {}
        if paths.exists(folder, GENERATION_CONFIG):
            generation = read_json(paths.member(folder, GENERATION_CONFIG))
        weights: Tensors = (plain := WeightFiles.open(folder))
        if config.get(QUANTIZATION) is not None:
            weights = PackedWeights.open(plain, config[QUANTIZATION], str(folder / CONFIG))
            config = {key: value for key, value in config.items() if key != QUANTIZATION}
        return CheckpointFolder(folder, config, generation, weights)

    def files(self) -> list[Path]:
        """Return every file that the compiled model depends on, for the cache key."""
        names = (CONFIG, GENERATION_CONFIG, *tokenizer.FILES)
        present = [paths.member(self.path, name) for name in names if paths.exists(self.path, name)]
        return [*present, *self.weights.files]

    def has_tokenizer(self) -> bool:
        """Say whether the folder has a tokenizer.json."""
        return paths.exists(self.path, tokenizer.TOKENIZER)

    def load_tokenizer(self) -> Tokenizer:
        """Load tokenizer.json and the chat template. Raises CheckpointError."""
        return Tokenizer.load(self.path)
