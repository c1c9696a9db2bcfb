"""Turn text into token ids and back: tokenizer.json and the few settings beside it.

A compiled artefact carries a copy of these two files, so a `Tokenizer` saves and loads itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from aios_compile.checkpoint import paths
from aios_compile.checkpoint.json_file import MAX_JSON_BYTES, read_bytes, read_json, read_text
from aios_compile.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from aios_compile.checkpoint.chat_template import ChatTemplate

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
GENERATION_CONFIG = "generation_config.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, TEMPLATE_JSON)
SETTINGS = "tokenizer_settings.json"  # in a folder written by save()
MAX_TOKENIZER_BYTES = 128 << 20
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_TEXTS = 1 << 15  # of single tokens that are kept: about 4 MB


class Tokenizer:
    """Encode and decode as transformers does with the same folder.

    `settings` holds what tokenizer.json lacks: special tokens by name, the chat template, the ids
    that end a text. tokenizer.json alone says which tokens are added at the ends of a text.
    """

    def __init__(self, data: bytes, settings: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._settings = dict(settings)
        self._backend = _parse(data, where)
        self.special_tokens: dict[str, str] = dict(settings["special_tokens"])
        present = [t for t in self.special_tokens.values() if self.token_id(t) is not None]
        self._backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in present]
        )
        self.texts_alone: dict[tuple[int, bool], str] = {}  # of single tokens; see TokenStream

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """Compile the template; Jinja is imported here, which an artefact's start need not wait
        for. CheckpointError if it is damaged.
        """
        source = self._settings.get("chat_template")
        if not source:
            return None
        from aios_compile.checkpoint.chat_template import ChatTemplate

        return ChatTemplate(source, self.special_tokens)

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """Load from a model folder, or from one written by save(). Raises CheckpointError."""
        folder = Path(folder)
        path = paths.member(folder, TOKENIZER)
        data = read_bytes(path, MAX_TOKENIZER_BYTES)
        if paths.exists(folder, SETTINGS):
            return Tokenizer(data, read_json(paths.member(folder, SETTINGS)), str(path))
        tokenizer = Tokenizer(data, _settings_of(folder), str(path))
        _ = tokenizer.chat_template  # a damaged one is found on loading; a copy was checked so
        return tokenizer

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, unchanged, and the settings; load() reads them back."""
        folder = Path(folder)
        (folder / TOKENIZER).write_bytes(self._data)
        (folder / SETTINGS).write_text(json.dumps(self._settings, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("bos_token", ""))

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("eos_token", ""))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json's, then the tokenizer's own."""
        ids = [*self._settings["eos_token_ids"], *([] if self.eos_id is None else [self.eos_id])]
        return tuple(dict.fromkeys(ids))

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that decode() leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, None where the vocabulary lacks it."""
        index: int | None = self._backend.token_to_id(token)
        return index

    def token(self, index: int) -> str | None:
        """Return a token as the vocabulary spells it, None for an unused id."""
        token: str | None = self._backend.id_to_token(index)
        return token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with the first and last tokens that the model expects."""
        if not isinstance(text, str):
            raise RequestError(f"the prompt is a {type(text).__name__}, expected text")
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):  # a lone surrogate; the library calls it "not a str"
            raise RequestError("the prompt is not valid Unicode text") from None
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids that the vocabulary lacks decode to nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """Return a decoder that takes ids one at a time."""
        return TokenStream(self, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation; encode it with add_special_tokens=False."""
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template", advice="pass the whole prompt as text"
            )
        return self.chat_template.render(messages, add_generation_prompt)


class TokenStream:
    """Text as it grows, never half a character.

    All pieces together are decode() of all ids, except where a byte-fallback tokenizer takes back
    what it said: there a bad byte turns the good bytes before it into replacement characters, and
    text that was given out stays. tokenizers' own DecodeStream raises in that case.

    A window of ids is decoded: those not yet given out, and one piece before them, because the text
    of a token can depend on the token before (a leading space, say).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._num_given = 0  # ids at the start of the window whose text was given out
        self._given = ""  # the text of those

    def push(self, index: int) -> str:
        """Return the text that became certain with this id; may be empty."""
        self._ids.append(index)
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= len(self._given) or text.endswith(REPLACEMENT):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Return what is held back, half a character as the replacement character."""
        return self._give(self._tokenizer.decode(self._ids, self._skip))

    def _give(self, text: str) -> str:
        if text.startswith(self._given):
            piece = text[len(self._given) :]
        else:  # taken back: go on with the new ids alone
            piece = self._tokenizer.decode(self._ids[self._num_given :], self._skip)
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        self._given = self._text_of_window()
        return piece

    def _text_of_window(self) -> str:
        """Return the text of the window; nearly always it is one token, whose text is kept."""
        if len(self._ids) != 1:
            return self._tokenizer.decode(self._ids, self._skip)
        known, key = self._tokenizer.texts_alone, (self._ids[0], self._skip)
        text = known.get(key)
        if text is None:
            text = self._tokenizer.decode(self._ids, self._skip)
            if len(known) < MOST_TEXTS:
                known[key] = text
        return text


def _parse(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except BaseException as error:  # the Rust parser may panic, which is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(
            f"{where}: not a tokenizer that the tokenizers library reads ({str(error)[:200]})"
        ) from None


def _settings_of(folder: Path) -> dict[str, Any]:
    """Collect the settings from the files of a Hugging Face folder."""
    config: dict[str, Any] = {}
    if paths.exists(folder, TOKENIZER_CONFIG):
        path = paths.member(folder, TOKENIZER_CONFIG)
        config = read_json(path)
        if config.get("auto_map"):
            raise CheckpointError(
                f"{path}: auto_map asks for tokenizer code from the folder, which is never run"
            )
    return {
        "special_tokens": _named_tokens(config),
        "chat_template": _template_source(folder, config),
        "eos_token_ids": _eos_token_ids(folder),
    }


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens; a token is a string, or an object with its content."""
    tokens = {}
    for name in NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own wins over the field; of several, "default"."""
    if paths.exists(folder, TEMPLATE):
        from aios_compile.checkpoint.chat_template import MAX_TEMPLATE_CHARS

        return read_text(paths.member(folder, TEMPLATE), MAX_TEMPLATE_CHARS)
    if paths.exists(folder, TEMPLATE_JSON):
        config = read_json(paths.member(folder, TEMPLATE_JSON), MAX_JSON_BYTES)
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [item for item in source if isinstance(item, dict)]
        source = next(
            (item.get("template") for item in named if item.get("name") == "default"), None
        )
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{folder / TOKENIZER_CONFIG}: chat_template is not text")
    return source


def _eos_token_ids(folder: Path) -> list[int]:
    if not paths.exists(folder, GENERATION_CONFIG):
        return []
    value = read_json(paths.member(folder, GENERATION_CONFIG)).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise CheckpointError(
                f"{folder / GENERATION_CONFIG}: eos_token_id {repr(index)[:40]} is not a token id"
            )
    return ids
