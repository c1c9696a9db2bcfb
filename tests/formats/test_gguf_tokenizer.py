"""Tokenizers of GGUF files: the ids and the text of the tokenizer that the file was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

import aios_compile
from aios_compile.checkpoint.gguf import GgufCheckpoint
from aios_compile.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.errors import CheckpointError, UnsupportedModelError
from tests import zoo
from tests.formats.gguf_files import convert
from tests.quick_builds import build_quickly

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shakespeare"
TEXTS = [
    "", " ", "  ", "\n", " \n\n \t x", "Hello world", "ROMEO:\nBut, soft! what light",
    "it's we'LL", "3.14159 and 1,000,000",
    "ﬁne Ünïcödé e\u0301 é", "日本語 и русский", "🎭👩‍👩‍👧 ok",
    "a_b(c)[d]{e}<f>", "<|turn|>JULIET:\nAy me!<|end|>\n", "<|endoftext|>", "<|turn|",
    "\x00\x7f\x85", "ſecret 'ſ", " \u00a0\u2003 wide", "x" * 300, "\r\n\r", "don't DON'T",
]  # fmt: skip


def example_keys(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """Write the example's tokenizer as llama.cpp's converter would."""
    data = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["id"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
         for i in range(len(tokens))]
    )  # fmt: skip
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_pad_token_id(0)
    settings = json.loads((EXAMPLE / "tokenizer_config.json").read_text())
    writer.add_chat_template(settings["chat_template"])


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "shakespeare.gguf"
    convert(EXAMPLE, path, lambda _: Kind.BF16, example_keys)
    return path


def test_the_examples_tokens(example: Path) -> None:
    ours, theirs = GgufCheckpoint.open(example).load_tokenizer(), Tokenizer.load(EXAMPLE)
    play = (EXAMPLE.parent / "tinyshakespeare.txt").read_text()
    for text in [*TEXTS, play[:20000], play[-20000:]]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text[:80]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, False) == theirs.decode(ids, False)
    assert ours.eos_ids == (0, 2) and ours.bos_id is None and ours.special_ids == {0, 1, 2}
    messages = [{"role": "user", "content": "Speak!"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert ours.vocab_size == theirs.vocab_size


def test_the_example_compiled(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file answers as the folder does, token by token, and its tokenizer is in the artefact."""
    build_quickly(monkeypatch)
    monkeypatch.setenv("AIOS_VERIFY", "0")
    options: dict[str, Any] = {"progress": False, "num_threads": 1}
    answers = []
    for source in (EXAMPLE, example):
        with aios_compile.load_and_compile(source, **options) as model:
            result = model.generate("JULIET:\nO ", max_tokens=24, temperature=0)
            answers.append((result.text, list(result.outputs[0].token_ids)))
            assert model.program.settings["eos_token_ids"] == [0, 2]
    assert answers[0] == answers[1]


def test_another_tokenizer_from_a_file(example: Path, tmp_path: Path) -> None:
    from aios_compile.config import CompileOptions
    from aios_compile.model_source import open_source

    path = tmp_path / "model.gguf"
    convert(zoo.make("qwen3_gqa", tmp_path), path, lambda _: Kind.Q8_0)
    assert open_source(path, CompileOptions.parse({})).tokenizer is None
    source = open_source(path, CompileOptions.parse({"tokenizer": str(example)}))
    assert source.tokenizer is not None and source.tokenizer.eos_ids == (0, 2)


def sentence_pieces() -> dict[str, Any]:
    """A small SentencePiece BPE: ids of specials, bytes, pieces and their scores."""
    pieces = ["▁", "t", "h", "e", "a", "n", "d", "th", "the", "▁the", "an", "and", "▁and", "▁▁",
              "he", "nd", "▁t", "▁a"]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merged = ["▁t", "he", "an", "th", "▁a", "nd", "the", "and", "▁the", "▁and", "▁▁"]
    scores = [-float(merged.index(t)) if t in merged else -100.0 for t in tokens]
    return {"tokens": tokens, "scores": scores, "types": [2, 3, 3] + [6] * 256 + [1] * len(pieces)}


def spm_file(tmp_path: Path, **changes: Any) -> Path:
    parts = sentence_pieces() | changes

    def finish(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(parts["tokens"])
        writer.add_token_scores(parts["scores"])
        writer.add_token_types(parts["types"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
            if key in parts:
                writer.add_bool(f"tokenizer.ggml.{key}", parts[key])

    path = tmp_path / "model.gguf"
    zoo.ZOO["llama_300"] = {"vocab_size": 300}
    convert(zoo.make("llama_300", tmp_path), path, lambda _: Kind.F32, finish)
    return path


def greedy_pieces(text: str, parts: dict[str, Any], prefix: bool = True) -> list[int]:
    """SentencePiece's BPE by its definition: join the best-scored neighbours, leftmost first."""
    score = {t: s for t, s, k in zip(parts["tokens"], parts["scores"], parts["types"]) if k == 1}
    symbols = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        joined = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        found = [(score[t], -i) for i, t in enumerate(joined) if t in score]
        if not found:
            break
        at = -max(found)[1]
        symbols[at : at + 2] = [joined[at]]
    index = {token: i for i, token in enumerate(parts["tokens"])}
    ids = []
    for symbol in symbols:
        ids += [index[symbol]] if symbol in score else [3 + byte for byte in symbol.encode()]
    return ids


def test_sentence_pieces(tmp_path: Path) -> None:
    parts = sentence_pieces()
    tokenizer = GgufCheckpoint.open(spm_file(tmp_path)).load_tokenizer()
    texts = ["the and", "thethe  and then", "hand", "é the\n", "  the", "tttheee", "", "日 and",
             "athendthe " * 20]  # fmt: skip
    for text in texts:
        assert tokenizer.encode(text) == [1, *greedy_pieces(text, parts)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("the", add_special_tokens=False) == greedy_pieces("the", parts)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>",
                                        "unk_token": "<unk>"}  # fmt: skip
    assert tokenizer.eos_ids == (2,)


def test_switches(tmp_path: Path) -> None:
    parts = sentence_pieces()
    path = spm_file(tmp_path, add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    tokenizer = GgufCheckpoint.open(path).load_tokenizer()
    assert tokenizer.encode("the and") == [*greedy_pieces("the and", parts, prefix=False), 2]
    assert tokenizer.decode(tokenizer.encode("the and")) == "the and"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"scores": [0.0]}, "scores has not one number a token"),
        ({"types": [1] * 5}, "token_type has not one number a token"),
        ({"tokens": ["a", "a"], "scores": [0.0] * 2, "types": [1] * 2}, "holds a token twice"),
        ({"tokens": ["a" * 257], "scores": [0.0], "types": [1]}, "a token of 257 characters"),
    ],
)
def test_damaged_vocabularies(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        GgufCheckpoint.open(spm_file(tmp_path, **changes)).load_tokenizer()


@pytest.mark.parametrize("key, value", [("pre", "klingon"), ("model", "t5")])
def test_kinds_are_refused_by_name(key: str, value: str, tmp_path: Path) -> None:
    def finish(writer: gguf.GGUFWriter) -> None:
        example_keys(writer)
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        writer.add_string(f"tokenizer.ggml.{key}", value)

    path = tmp_path / "model.gguf"
    convert(EXAMPLE, path, lambda _: Kind.BF16, finish)
    with pytest.raises(UnsupportedModelError, match=rf"{key} '{value}'.*\n.*tokenizer=FOLDER"):
        GgufCheckpoint.open(path).load_tokenizer()


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_nothing(name: str, tmp_path: Path) -> None:
    """Its expressions are valid, and whatever they cut, decoding gives the text again."""
    data = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    from aios_compile.checkpoint.gguf_header import GgufHeader
    from aios_compile.checkpoint.gguf_tokenizer import tokenizer_of

    prefix = "tokenizer.ggml."
    header = GgufHeader(tmp_path, {
        f"{prefix}model": "gpt2", f"{prefix}pre": name,
        f"{prefix}tokens": sorted(vocabulary, key=vocabulary.get),
        f"{prefix}merges": [" ".join(m) for m in data["model"]["merges"]],
    }, {})  # fmt: skip
    tokenizer = tokenizer_of(header)
    for text in TEXTS:
        if PRE_TOKENIZERS[name].nfc and "e\u0301" in text:
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
