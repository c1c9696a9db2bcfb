"""Build a Tokenizer from `tokenizer.ggml.*`: the vocabulary becomes the JSON of a tokenizer.json.

Two models: "gpt2", byte-pair merges over bytes spelled as characters; "llama", SentencePiece's BPE,
whose merges follow from the pieces' scores, with unknown characters as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aios_compile.checkpoint.gguf_header import GgufHeader
from aios_compile.checkpoint.gguf_pretokenizers import (
    PRE_TOKENIZERS,
    byte_level_json,
    normalizer_json,
    pre_tokenizer_json,
)
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.errors import CheckpointError, UnsupportedModelError

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
MAX_PIECE_CHARS = 256  # of a SentencePiece token; its halves are looked up one by one
NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # spelled so in the specification
    "padding": "pad_token",
}
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message


def has_tokenizer(header: GgufHeader) -> bool:
    """Say whether the file has a vocabulary."""
    return header.metadata.get(PREFIX + "model", "none") not in ("none", "no_vocab")


def tokenizer_of(header: GgufHeader) -> Tokenizer:
    """Build the tokenizer. Raises CheckpointError, or UnsupportedModelError for a kind of
    tokenizer that is not implemented, by name.
    """
    vocabulary = _Vocabulary(header)
    model = header.metadata.get(PREFIX + "model")
    if model == "gpt2":
        parts = _byte_pairs(vocabulary)
    elif model == "llama":
        parts = _sentence_pieces(vocabulary)
    else:
        raise UnsupportedModelError(
            f"{header.path}: {PREFIX}model {repr(model)[:40]} is not implemented, known: gpt2, "
            "llama",
            advice="name a folder with a tokenizer.json: tokenizer=FOLDER",
        )
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        **parts,
    }
    tokenizer = Tokenizer(json.dumps(whole).encode(), _settings(vocabulary), str(header.path))
    _ = tokenizer.chat_template  # a damaged one is found on loading
    return tokenizer


class _Vocabulary:
    """The tokens and settings of a file, type-checked."""

    def __init__(self, header: GgufHeader) -> None:
        self.metadata = header.metadata
        self.where = str(header.path)
        self.tokens = self.strings("tokens")
        if len(set(self.tokens)) != len(self.tokens):
            raise CheckpointError(f"{self.where}: {PREFIX}tokens holds a token twice")
        kinds = self.numbers("token_type")
        self.kinds: list[int] = [NORMAL] * len(self.tokens) if kinds is None else kinds.tolist()

    def get(self, key: str) -> Any:
        return self.metadata.get(PREFIX + key)

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.where}: {PREFIX}{key} is not a list of texts")
        return value

    def numbers(self, key: str) -> Any:
        """Return one number a token, None where the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) < len(self.tokens):
            raise CheckpointError(f"{self.where}: {PREFIX}{key} has not one number a token")
        return value[: len(self.tokens)]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {PREFIX}{key} is {repr(value)[:40]}, not a bool")
        return value

    def special(self, short: str) -> int | None:
        """Return the id of a special token; one beyond the vocabulary means none, as there."""
        value = self.get(f"{short}_token_id")
        if isinstance(value, int) and 0 <= value < len(self.tokens):
            return value
        return None

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the tokens that are found in the text before anything else is done with it."""
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for i, kind in enumerate(self.kinds)
            if kind in kinds and self.tokens[i]
        ]

    def template(self, add_bos: bool) -> dict[str, Any] | None:
        """Return the post-processor that adds the first and last tokens."""
        first = self.special("bos") if self.flag("add_bos_token", add_bos) else None
        last = self.special("eos") if self.flag("add_eos_token", False) else None
        if first is None and last is None:
            return None
        ends = [self.tokens[i] for i in (first, last) if i is not None]

        def around(*names: str) -> list[dict[str, Any]]:
            items: list[dict[str, Any]] = []
            for kind, name in enumerate(names):
                before = [] if first is None else [_special(self.tokens[first], kind)]
                after = [] if last is None else [_special(self.tokens[last], kind)]
                items += [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]
            return items

        tokens = {t: {"id": t, "ids": [self.tokens.index(t)], "tokens": [t]} for t in ends}
        return {
            "type": "TemplateProcessing",
            "single": around("A"),
            "pair": around("A", "B"),
            "special_tokens": tokens,
        }


def _special(token: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": kind}}


def _byte_pairs(vocabulary: _Vocabulary) -> dict[str, Any]:
    name = vocabulary.get("pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{vocabulary.where}: {PREFIX}pre {repr(name)[:40]} is not implemented, known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}",
            advice="name a folder with the model's tokenizer.json: tokenizer=FOLDER",
        )
    kind = PRE_TOKENIZERS[name]
    merges = []
    for merge in vocabulary.strings("merges"):
        left, space, right = merge[1:].partition(" ")  # the first half is never empty
        if not space:
            raise CheckpointError(f"{vocabulary.where}: the merge {merge[:40]!r} is not a pair")
        merges.append((merge[0] + left, right))
    tokens = {t: i for i, (t, k) in enumerate(zip(vocabulary.tokens, vocabulary.kinds))
              if k != UNUSED}  # fmt: skip
    return {
        "normalizer": normalizer_json(kind),
        "pre_tokenizer": pre_tokenizer_json(kind),
        "post_processor": vocabulary.template(kind.add_bos),
        "decoder": byte_level_json(True),
        "model": _bpe(tokens, merges, ignore_merges=kind.ignore_merges),
    }


def _sentence_pieces(vocabulary: _Vocabulary) -> dict[str, Any]:
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise UnsupportedModelError(
            f"{vocabulary.where}: {PREFIX}remove_extra_whitespaces is not implemented"
        )
    prefix_space = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.special("unknown")
    tokens = {token: i for i, token in enumerate(vocabulary.tokens)}
    normal: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*normal, _replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": vocabulary.template(True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(
            tokens,
            _merges_of(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _merges_of(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE, best first.

    SentencePiece joins the neighbours whose union has the best score. As a list of merges: each way
    to halve a piece into two pieces, in the order of the pieces' scores.
    """
    scores = vocabulary.numbers("scores")
    if scores is None:
        raise CheckpointError(f"{vocabulary.where}: {PREFIX}scores is missing")
    known = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds)
        if kind in (NORMAL, USER_DEFINED)
    }
    long = max(known, key=len, default="")
    if len(long) > MAX_PIECE_CHARS:
        raise CheckpointError(
            f"{vocabulary.where}: a token of {len(long)} characters, at most {MAX_PIECE_CHARS}"
        )
    ranked = sorted(range(len(vocabulary.tokens)), key=lambda i: -float(scores[i]))
    merges = []
    for i in ranked:
        piece = vocabulary.tokens[i]
        if piece in known:
            halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            merges += [pair for pair in halves if pair[0] in known and pair[1] in known]
    return merges


def _bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **changes: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **changes,
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _settings(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Return what tokenizer.json has no place for; see checkpoint/tokenizer.py."""
    named = {name: vocabulary.special(short) for short, name in NAMED.items()}
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{vocabulary.where}: tokenizer.chat_template is not text")
    ends = [vocabulary.special(short) for short in ENDS]
    return {
        "special_tokens": {k: vocabulary.tokens[i] for k, i in named.items() if i is not None},
        "chat_template": template,
        "eos_token_ids": list(dict.fromkeys(i for i in ends if i is not None)),
    }
