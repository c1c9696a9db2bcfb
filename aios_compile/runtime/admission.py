"""The one admission point: every check of a request, before anything is allocated for it.

After it only the model itself can fail a request. It has no side effect, so a refused request
leaves no trace and disturbs nobody.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aios_compile.errors import PromptTooLongError, RequestError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.request import Admitted
from aios_compile.sampling_params import SamplingParams

# No vocabulary has longer tokens on average: text beyond this is refused before it is tokenised.
MAX_BYTES_PER_TOKEN = 256

Prompt = str | Sequence[int]


def as_prompts(value: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return (prompts, whether `value` was one prompt: a text or a list of ids)."""
    if isinstance(value, str) or (len(value) > 0 and _is_whole_number(value[0])):
        return [value], True  # type: ignore[list-item]
    return list(value), False  # type: ignore[arg-type]


@dataclass(frozen=True)
class Admission:
    """What requests are checked against."""

    limits: Limits
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    why_not: str = ""  # why the model can be called but not generated from

    def admit(self, prompt: Prompt, params: SamplingParams) -> Admitted:
        """Return the request ready to run; raise RequestError or PromptTooLongError."""
        if not isinstance(params, SamplingParams):
            raise not_params(params)
        if self.why_not:
            raise RequestError(
                f"this model cannot generate: {self.why_not}",
                advice="call it for logits, model(input_ids)",
            )
        ids = self._prompt_ids(prompt)
        max_tokens = self._max_tokens(len(ids), params)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none")
        bad_words = self._bad_words(params)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stops = frozenset(params.stop_token_ids)
        banned = sorted(eos | stops) if params.min_tokens else []
        _check_something_is_left(params, banned, bad_words)
        bias = params.logit_bias or {}
        early = {**bias, **dict.fromkeys(banned, -np.inf)}
        return Admitted(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            eos_token_ids=eos,
            stop_token_ids=stops,
            bias_ids=np.array(list(bias), np.int64),
            bias_values=np.array(list(bias.values()), np.float32),
            early_bias_ids=np.array(list(early), np.int64),
            early_bias_values=np.array(list(early.values()), np.float32),
            allowed_ids=np.array(params.allowed_token_ids or (), np.int64),
            bad_words=bad_words,
        )

    def admit_for_logits(self, token_ids: Sequence[int]) -> Admitted:
        """Return a request for the logits of all positions of one sequence; nothing is sampled."""
        ids = self._prompt_ids(token_ids)
        if self.why_not and len(ids) > self.limits.max_num_batched_tokens:
            raise PromptTooLongError(
                f"the input has {len(ids)} tokens, expected at most "
                f"{self.limits.max_num_batched_tokens}: {self.why_not}, so it runs in one step",
                advice="a larger max_num_batched_tokens",
            )
        if len(ids) > self.limits.max_model_len:
            raise _too_long(len(ids), self.limits.max_model_len, "max_model_len")
        if len(ids) > self.limits.capacity_tokens:
            raise _too_long(len(ids), self.limits.capacity_tokens, "the KV cache")
        no_ids, no_values = np.zeros(0, np.int64), np.zeros(0, np.float32)
        params = SamplingParams(max_tokens=None, temperature=0.0)
        none: frozenset[int] = frozenset()
        biases = (no_ids, no_values, no_ids, no_values)
        return Admitted(None, ids, params, 0, none, none, *biases, no_ids, ())

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                advice = "give token ids, a list of whole numbers"
                raise RequestError("a prompt of text needs a tokenizer, got none", advice=advice)
            limit = self.limits.max_model_len * MAX_BYTES_PER_TOKEN
            if len(prompt) > limit:  # a character is at least a byte
                raise PromptTooLongError(
                    f"the prompt has {len(prompt)} characters, expected at most {limit}"
                )
            ids = list(self.tokenizer.encode(prompt))
        else:
            ids = whole_numbers(prompt)
        if not ids:
            raise RequestError("the prompt is empty: got 0 tokens, expected at least 1")
        self._check_ids("prompt", ids)
        return ids

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """Return max_tokens clipped to the model's length; raise when it can never fit."""
        limits = self.limits
        if num_prompt >= limits.max_model_len:
            raise _too_long(num_prompt, limits.max_model_len - 1, "max_model_len minus one")
        room = limits.max_model_len - num_prompt
        wanted = room if params.max_tokens is None else min(room, params.max_tokens)
        # the last token is sampled and never enters the cache
        fitting = limits.capacity_tokens - num_prompt + 1
        if params.max_tokens is None:
            wanted = min(wanted, fitting)
        if fitting < max(1, wanted):
            raise PromptTooLongError(
                f"prompt ({num_prompt} tokens) and max_tokens ({wanted}) need "
                f"{num_prompt + wanted - 1} tokens of KV cache, it has {limits.capacity_tokens}",
                advice="a smaller max_tokens, or a larger kv_cache_memory_bytes",
            )
        return wanted

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.limits.vocab_size:
                raise RequestError(
                    f"{name}: token id {token_id} is out of the vocabulary, "
                    f"expected 0 to {self.limits.vocab_size - 1}"
                )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Tokenise bad words, with and without a space before them: a word starts either way."""
        if params.bad_words and self.tokenizer is None:
            raise RequestError("bad_words need a tokenizer, and this model has none")
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                assert self.tokenizer is not None
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                self._check_ids("bad_words", ids)
                if ids:
                    found[ids] = None
        return tuple(found)


def not_params(given: object) -> RequestError:
    """Return the error for something else where sampling parameters belong."""
    return RequestError(
        f"sampling_params: got a {type(given).__name__}, expected SamplingParams or a list of them",
        advice="give fields as keywords: max_tokens=16, temperature=0",
    )


def whole_numbers(prompt: Sequence[int]) -> list[int]:
    """Return a prompt's token ids as ints; raise RequestError for what is none."""
    if not isinstance(prompt, Iterable):
        kind = type(prompt).__name__
        raise RequestError(f"prompt: got a {kind}, expected text or a list of whole numbers")
    items = list(prompt)
    for item in items:
        if not _is_whole_number(item):
            raise RequestError(f"prompt: got {item!r}, expected text or a list of whole numbers")
    return [operator.index(item) for item in items]


def _is_whole_number(item: object) -> bool:
    try:
        operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(item, bool)


def _check_something_is_left(
    params: SamplingParams, banned: list[int], bad_words: tuple[tuple[int, ...], ...]
) -> None:
    never = set(banned) | {word[0] for word in bad_words if len(word) == 1}
    if params.allowed_token_ids is not None and never.issuperset(params.allowed_token_ids):
        raise RequestError(
            "allowed_token_ids leaves no token: min_tokens and bad_words ban all of them"
        )


def _too_long(got: int, limit: int, what: str) -> PromptTooLongError:
    return PromptTooLongError(
        f"the prompt has {got} tokens, expected at most {limit} ({what})",
        advice="a shorter prompt, or a larger max_model_len",
    )
