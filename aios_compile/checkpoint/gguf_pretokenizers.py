"""How text is cut before byte-pair merging, by the names in `tokenizer.ggml.pre`.

The names and which behaviour they stand for are llama.cpp's (src/llama-vocab.cpp); the expressions
are those of the tokenizer.json files that the names were made for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    + _SPACES
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words end where the case goes up again (Tekken, GPT-4o)."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
    )


class PreTokenizer(NamedTuple):
    """expressions: each cuts further. A text that is a token as a whole stays one where
    `ignore_merges`. `add_bos` is what holds where the file does not say.
    """

    expressions: tuple[str, ...]
    byte_level_regex: bool = False  # GPT-2's own expression, built into tokenizers
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = PreTokenizer((), byte_level_regex=True)
_DIGITS = PreTokenizer((r"\p{N}",), byte_level_regex=True)
_KINDS: dict[PreTokenizer, str] = {
    _GPT2: "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion exaone4",
    _DIGITS: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): "llama3 llama-v3 llama-bpe falcon3 "
    "falcon-h1 pixtral midm-2.0 lfm2",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe",
    PreTokenizer((_QWEN2,), nfc=True): "qwen2",
    PreTokenizer((_QWEN2,)): "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open "
    "grok-2",
    PreTokenizer((_QWEN35,)): "qwen35",
    PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),)): "gpt-4o llama4 kanana2",
}
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def normalizer_json(kind: PreTokenizer) -> dict[str, Any] | None:
    """Return the normalizer of tokenizer.json."""
    return {"type": "NFC"} if kind.nfc else None


def pre_tokenizer_json(kind: PreTokenizer) -> dict[str, Any]:
    """Return the pre_tokenizer of tokenizer.json; the last step spells bytes as characters."""
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        for text in kind.expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*cuts, byte_level_json(kind.byte_level_regex)]}


def byte_level_json(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
