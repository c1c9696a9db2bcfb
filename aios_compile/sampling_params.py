"""What a request may ask of sampling: vLLM's names and meaning, plus transformers' aliases.

Ranges are checked here; what needs the model (vocabulary, tokenizer, lengths) is checked once more
in `runtime/admission.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from aios_compile.errors import RequestError

MAX_LOGPROBS = 20  # width of the top lists that a step returns; vLLM's default max_logprobs
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_N = 1024
MAX_TENANT_LENGTH = 256
OF_THE_REQUEST = ("seed", "logprobs", "tenant", "priority", "timeout_s")  # never a model's default
ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
ALIASES |= {"num_return_sequences": "n", "do_sample": "temperature"}


@dataclass(frozen=True, init=False)
class SamplingParams:
    """How one request is sampled. Frozen; every value is checked when it is made.

    temperature 0 is greedy. max_tokens None means up to the model's length. top_k 0 (or -1) is off.
    logprobs k reports the chosen token and the k best ones, from the raw logits. seed None derives
    one from the engine's seed and the request's number. Aliases of transformers: max_new_tokens,
    min_new_tokens, num_return_sequences, do_sample (False means temperature 0). tenant: requests
    share cached prefixes with those of the same tenant only (vLLM's cache_salt), and a fair share
    under scheduling_policy="fair_share". priority: smaller is more urgent, under "priority".
    timeout_s: after so many seconds the request ends with finish_reason "abort".
    Raises RequestError with the field, the value and the range; unknown names list the known ones.
    """

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: tuple[int, ...] | None
    bad_words: tuple[str, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    tenant: str
    priority: int
    timeout_s: float | None

    def __init__(
        self,
        *,
        n: int = 1,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
        bad_words: Iterable[str] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        tenant: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **aliases: Any,
    ) -> None:
        given = dict(locals())
        values = {field.name: given[field.name] for field in fields(SamplingParams)}
        values |= resolve_aliases(aliases)
        for name, value in values.items():
            object.__setattr__(self, name, _checked(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", self.min_tokens, f"0 to max_tokens={self.max_tokens}")

    def __hash__(self) -> int:
        bias = None if self.logit_bias is None else tuple(sorted(self.logit_bias.items()))
        names = (f.name for f in fields(self) if f.name != "logit_bias")
        return hash((bias, *(getattr(self, name) for name in names)))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @staticmethod
    def defaults_from(generation_config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the defaults that a generation_config.json sets, each with where it came from."""
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        known = {field.name for field in fields(SamplingParams)}.difference(OF_THE_REQUEST)
        for key, value in generation_config.items():
            name = ALIASES.get(key, key)
            if name not in known or value is None or (key == "do_sample" and value):
                continue
            if key == "temperature" and generation_config.get("do_sample") is False:
                continue
            values[name] = 0.0 if key == "do_sample" else value
            sources[name] = f"generation_config.json: {key}"
        try:
            SamplingParams(**values)
        except RequestError as error:
            raise RequestError(f"generation_config.json: {error.message}") from error
        return SamplingDefaults(values, sources)


@dataclass(frozen=True)
class SamplingDefaults:
    """Values that replace the built-in defaults, and the source of each; `str()` says both."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def params(self, **given: Any) -> SamplingParams:
        """Return parameters: `given` first, then these defaults, then the built-in ones."""
        resolved = dict(given)
        for alias in [key for key in given if key in ALIASES]:
            resolved |= resolve_aliases({alias: resolved.pop(alias)})
        merged = {**self.values, **resolved}
        if given.get("do_sample") is True and merged.get("temperature") == 0:
            del merged["temperature"]  # the default was greedy because of do_sample
        limit, least = merged.get("max_tokens", 16), merged.get("min_tokens", 0)
        if "min_tokens" not in resolved and limit is not None and least > limit:
            merged["min_tokens"] = limit  # a default never turns a good request into a bad one
        return SamplingParams(**merged)

    def __str__(self) -> str:
        builtin = SamplingParams()
        lines = []
        for field in fields(SamplingParams):
            value = self.values.get(field.name, getattr(builtin, field.name))
            lines.append(f"{field.name}={value!r} ({self.sources.get(field.name, 'built in')})")
        return "\n".join(lines)


def resolve_aliases(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` (aliases only) under the real names; raise RequestError for unknown names."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in ALIASES:
            known = ", ".join([field.name for field in fields(SamplingParams)] + list(ALIASES))
            raise RequestError(f"unknown sampling parameter {key!r}", advice=f"one of: {known}")
        if key != "do_sample":
            values[ALIASES[key]] = value
        elif not isinstance(value, bool):
            raise _out_of_range(key, value, "True or False")
        elif value is False:
            values["temperature"] = 0.0
    return values


def _out_of_range(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name}={_short(value)} is out of range: expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _integer(low: int, high: float = math.inf, *, none: bool = False) -> Any:
    bound = f"{low} to {high}" if high != math.inf else f"{low} or more"
    expected = f"a whole number, {bound}" + (", or None" if none else "")

    def check(name: str, value: Any) -> int | None:
        if value is None and none:
            return None
        try:
            number = operator.index(value)
        except TypeError:
            raise _out_of_range(name, value, expected) from None
        if isinstance(value, bool) or not low <= number <= high:
            raise _out_of_range(name, value, expected)
        return number

    return check


def _number(
    low: float, high: float, *, open_low: bool = False, or_zero: bool = False, none: bool = False
) -> Any:
    expected = f"a number from {low} {'(not included) ' if open_low else ''}to {high}"
    expected += (", or 0" if or_zero else "") + (", or None" if none else "")

    def check(name: str, value: Any) -> float | None:
        if value is None and none:
            return None
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise _out_of_range(name, value, expected)
        number = float(value)
        inside = low < number <= high if open_low else low <= number <= high
        if not inside and not (or_zero and number == 0):
            raise _out_of_range(name, value, expected)
        return number

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _out_of_range(name, value, "True or False")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    expected = f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters"
    if len(items) > MAX_STOP_STRINGS:
        raise _out_of_range(name, items, expected)
    for item in items:
        if not _is_unicode(item) or not 1 <= len(item) <= MAX_STOP_LENGTH:
            raise _out_of_range(name, item, expected)
    return items


def _tenant(name: str, value: Any) -> str:
    if not _is_unicode(value) or len(value) > MAX_TENANT_LENGTH:
        raise _out_of_range(name, value, f"a text of at most {MAX_TENANT_LENGTH} characters")
    return str(value)


def _is_unicode(value: Any) -> bool:
    """Return whether it is a text that has bytes; half a surrogate pair has none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    check = _integer(0)
    return () if value is None else tuple(check(name, item) for item in value)


def _allowed(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = tuple(sorted(set(_token_ids(name, value))))
    if not ids:
        raise _out_of_range(name, value, "at least one token id, or None to allow all")
    return ids


def _logit_bias(name: str, value: Any) -> Mapping[int, float] | None:
    if not value:
        return None
    check_id, check_bias = _integer(0), _number(-100.0, 100.0)
    items = value.items() if isinstance(value, Mapping) else value
    # JSON has string keys only, and OpenAI clients send them
    pairs = ((int(k) if isinstance(k, str) and k.isdigit() else k, v) for k, v in items)
    return {check_id(name, key): check_bias(name, bias) for key, bias in pairs}


def _top_k(name: str, value: Any) -> int:
    return max(0, int(_integer(-1)(name, value)))


def _seed(name: str, value: Any) -> int | None:
    seed = _integer(-1, 2**64 - 1, none=True)(name, value)
    return None if seed in (None, -1) else int(seed)


def _checked(name: str, value: Any) -> Any:
    """Return the value of a field as it is kept; what has another type altogether is refused."""
    try:
        return _CHECKS[name](name, value)
    except RequestError:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError):
        expected = _KINDS.get(name, "a number")
        raise _out_of_range(name, value, expected) from None


_KINDS = {
    "stop": "a text, or a list of texts",
    "bad_words": "a text, or a list of texts",
    "stop_token_ids": "a list of token ids",
    "allowed_token_ids": "a list of token ids, or None to allow all",
    "logit_bias": "a mapping of token ids to numbers from -100 to 100",
}
_CHECKS: dict[str, Any] = {
    "n": _integer(1, MAX_N),
    "max_tokens": _integer(1, none=True),
    "min_tokens": _integer(0),
    # below 0.01 logit / temperature overflows float32 for large logits; vLLM clamps there
    "temperature": _number(0.01, 1000.0, or_zero=True),
    "top_p": _number(0.0, 1.0, open_low=True),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0),
    "seed": _seed,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "include_stop_str_in_output": _boolean,
    "repetition_penalty": _number(0.01, 100.0),
    "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "logit_bias": _logit_bias,
    "allowed_token_ids": _allowed,
    "bad_words": _strings,
    "logprobs": _integer(0, MAX_LOGPROBS, none=True),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS, none=True),
    "tenant": _tenant,
    "priority": _integer(-(2**31), 2**31),
    "timeout_s": _number(0.0, 1e9, open_low=True, none=True),
}
