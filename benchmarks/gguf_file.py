"""The random checkpoint as a GGUF file of one type of tensors, written with the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

# Which of llama.cpp's types has the same bits a weight as ours.
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the checkpoint's tensors as a GGUF file without a tokenizer, once."""
    if path.exists():
        return
    from gguf import GGMLQuantizationType, GGUFWriter

    from tests.formats.gguf_files import convert

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]

    def finish(writer: GGUFWriter) -> None:
        writer.add_vocab_size(vocab)
        writer.add_tokenizer_model("no_vocab")

    partial = path.with_suffix(".partial")
    convert(folder, partial, lambda _: GGMLQuantizationType[kind], finish)
    partial.rename(path)
