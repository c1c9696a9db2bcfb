"""Options shared by the commands, as tables; `command` turns tables into a typer command.

An option that is not given is not passed on, so the defaults live in one place: CompileOptions,
SamplingParams and the model's generation_config.json.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from aios_compile.cli.output import print_error
from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError, ConfigError, RequestError

EXIT_MISTAKE, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED = 1, 141, 130

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="model folder, GGUF file, hub id, or FILE.py:NAME (a module)"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]


@dataclass(frozen=True)
class OptionTable:
    """A group of options that reaches the command as one dict, in its parameter `target`."""

    target: str
    kinds: dict[str, tuple[Any, str]]  # name -> (type, help)
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict


# Keyed by the annotation as written in CompileOptions.
_KINDS: dict[str, Any] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "bool": bool,
    "tuple[str, ...]": list[str],
    "Mapping[str, Any] | None": str,
}


def _compile_values(given: dict[str, Any]) -> dict[str, Any]:
    if "speculative_config" in given:
        try:
            given["speculative_config"] = json.loads(given["speculative_config"])
        except ValueError as error:
            raise ConfigError(f"speculative_config is not JSON: {error}") from error
    CompileOptions.parse(given)  # a mistake is told before anything is loaded
    return given


def _sampling_values(given: dict[str, Any]) -> dict[str, Any]:
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    from aios_compile.sampling_params import SamplingParams

    SamplingParams(**given)  # a mistake is told before anything is loaded
    return given


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError as error:
        raise RequestError(f"logit_bias={text!r} is not ID=BIAS, such as 42=-100") from error


COMPILE = OptionTable(
    "options",
    {
        item.name: (_KINDS[str(item.type)], item.metadata["help"])
        for item in dataclasses.fields(CompileOptions)
    },
    _compile_values,
)

SAMPLING = OptionTable(
    "sampling",
    {
        "max_tokens": (int, "most tokens to generate"),
        "min_tokens": (int, "least tokens before an end may come"),
        "temperature": (float, "0 is greedy"),
        "top_p": (float, "keep the likeliest tokens up to this probability"),
        "top_k": (int, "keep the K likeliest tokens; 0 keeps all"),
        "min_p": (float, "keep tokens of at least this share of the likeliest one's probability"),
        "n": (int, "number of completions"),
        "sampling_seed": (int, "seed of this request"),
        "stop": (list[str], "end at this text; may be repeated"),
        "stop_token_ids": (list[int], "end at this token; may be repeated"),
        "ignore_eos": (bool, "go on after the end-of-sequence token"),
        "include_stop_str_in_output": (bool, "keep the stop text in the output"),
        "repetition_penalty": (float, "above 1: repeat less"),
        "presence_penalty": (float, "subtracted from tokens that came already"),
        "frequency_penalty": (float, "subtracted for each time that a token came"),
        "logit_bias": (list[str], "ID=BIAS, added to a token's logit; may be repeated"),
        "allowed_token_ids": (list[int], "only these tokens; may be repeated"),
        "bad_words": (list[str], "words that never come; may be repeated"),
        "logprobs": (int, "log-probabilities of so many best tokens (with --json)"),
        "prompt_logprobs": (int, "the same for the prompt (with --json)"),
        "priority": (int, "smaller is more urgent (--scheduling-policy priority)"),
        "timeout_s": (float, "end the request after so many seconds"),
        "tenant": (str, "cached prefixes are shared within a tenant only"),
    },
    _sampling_values,
)
# `--seed` belongs to the model (load_and_compile); a request's own seed has another flag.
_RENAMED = {"sampling_seed": "seed"}


def command(
    app: typer.Typer, *tables: OptionTable, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`, with the options of `tables`.

    Maps errors to exit codes: AiosError and a path that cannot be used 1, Ctrl-C 130, a closed
    pipe 141.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        targets = {table.target for table in tables}
        parameters = [
            item.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for item in own.values()
            if item.name not in targets
        ]
        for table in tables:
            parameters += [_parameter(n, kind, text) for n, (kind, text) in table.kinds.items()]

        def run(**given: Any) -> None:
            _guarded(lambda: function(**_split(given, tables)), bool(given.get("as_json")))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(name or function.__name__)(run)
        return function

    return register


def _parameter(name: str, kind: Any, text: str) -> inspect.Parameter:
    annotation = Annotated[kind | None, typer.Option(help=text, show_default=False)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)


def _split(given: dict[str, Any], tables: tuple[OptionTable, ...]) -> dict[str, Any]:
    """Return the function's arguments: its own, and one dict of what was given for each table."""
    arguments = dict(given)
    for table in tables:
        chosen = {name: arguments.pop(name) for name in table.kinds}
        named = {
            _RENAMED.get(name, name): value
            for name, value in chosen.items()
            if value is not None and value != []
        }
        arguments[table.target] = table.convert(named)
    return arguments


def _guarded(body: Callable[[], None], as_json: bool) -> None:
    try:
        body()
        sys.stdout.flush()
    except AiosError as error:
        print_error(error, as_json)
        raise typer.Exit(EXIT_MISTAKE) from None
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _forget_stdout()
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM:
            raise
        what = error.filename or "cannot write"
        if error.filename is None:
            _forget_stdout()
        print_error(ConfigError(f"{what}: {error.strerror}"), as_json and bool(error.filename))
        raise typer.Exit(EXIT_MISTAKE) from None


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _forget_stdout() -> None:
    """Let stdout go nowhere: Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
