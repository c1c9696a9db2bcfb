"""GGUF files against llama.cpp: its golden token ids, and its library's tokens and logits.

    LLAMA_CPP_MODELS=llama.cpp/models pytest tests/nightly/test_gguf_llama_cpp.py

The folder holds ggml-vocab-*.gguf with .inp and .out beside them, as in llama.cpp's repository.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import aios_compile
from aios_compile.checkpoint.gguf import GgufCheckpoint
from aios_compile.checkpoint.gguf_header import read_gguf_header
from aios_compile.checkpoint.gguf_tokenizer import tokenizer_of
from tests import zoo
from tests.formats.gguf_files import convert
from tests.formats.test_gguf_tokenizer import EXAMPLE, TEXTS, example_keys

GOLDENS = Path(os.environ.get("LLAMA_CPP_MODELS", "no-such-folder"))
VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm", "qwen2", "qwen35", "starcoder", "refact",
                "command-r", "mpt", "phi-3")  # fmt: skip


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="LLAMA_CPP_MODELS names no folder of golden files")
@pytest.mark.parametrize("name", VOCABULARIES)
def test_golden_tokens(name: str) -> None:
    path = GOLDENS / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"LLAMA_CPP_MODELS has no {path.name}")
    tokenizer = tokenizer_of(read_gguf_header(path))
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) > 40 and len(lines) >= len(texts)
    for text, line in zip(texts, lines):
        expected = [int(number) for number in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


# Its Python binding would override what the file says. llama.cpp itself reads yarn_beta_fast and
# yarn_beta_slow for few architectures, though its converter writes them for all: models that need
# other values than 32 and 1 answer as transformers does here, and not there.
OPTIONS = {"yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "yarn_attn_factor": -1.0}


def llama(path: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    settings = {"verbose": False, "logits_all": True, "n_ctx": 256, **OPTIONS, **options}
    return llama_cpp.Llama(str(path), **settings)


def test_tokens_of_the_example(tmp_path: Path) -> None:
    path = tmp_path / "shakespeare.gguf"
    convert(EXAMPLE, path, lambda _: Kind.BF16, example_keys)
    theirs, ours = llama(path, vocab_only=True), GgufCheckpoint.open(path).load_tokenizer()
    play = (EXAMPLE.parent / "tinyshakespeare.txt").read_text()
    for text in [*TEXTS, play[:20000]]:
        ids = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert ours.encode(text) == ids, text[:80]


@pytest.mark.parametrize(
    "name, kind", [("llama_gqa", Kind.F32), ("llama_llama3", Kind.F32), ("llama_yarn", Kind.F32),
                   ("qwen2_gqa", Kind.F32), ("qwen3_gqa", Kind.F32), ("llama_gqa", Kind.Q8_0)],
)  # fmt: skip
def test_logits(name: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, two engines. llama.cpp rounds activations to 8 bits where weights are quantised."""
    monkeypatch.setenv("AIOS_VERIFY", "0")

    def finish(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"<0x{i:02X}>" for i in range(128)])
        writer.add_token_scores([0.0] * 128)
        writer.add_token_types([6] * 128)

    path = tmp_path / "model.gguf"
    folder = zoo.make(name, tmp_path)
    convert(folder, path, lambda _: kind, finish)
    ids = zoo.token_ids(folder)
    theirs = llama(path)
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    with aios_compile.load_and_compile(path, dtype="float32", progress=False) as model:
        difference = np.abs(model(ids).numpy() - expected).max()
    assert difference <= (2e-3 if kind is Kind.F32 else 0.3), difference
