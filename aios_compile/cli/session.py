"""A model for a command, and one streamed answer with its timing."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_compile.errors import ConfigError

if TYPE_CHECKING:
    from aios_compile.compiled_model import CompiledModel


def load(model: str, options: dict[str, Any]) -> CompiledModel:
    """Load and compile `model`; the import is here so that `aios --help` needs none of it."""
    import aios_compile

    return aios_compile.load_and_compile(model_of(model), **options)


def model_of(text: str) -> Any:
    """Return MODEL as the library takes it: of FILE.py:NAME the module that the user's file makes.

    Only a file that is named so is run, never one that lies in a model folder. NAME is an nn.Module
    or a function without arguments that returns one; it is made once, so that all programs of a
    command have its weights. Raises ConfigError for a file or a name that is not there.
    """
    path, colon, name = text.rpartition(":")
    return _made(path, name) if colon and path.endswith(".py") else text


@functools.cache
def _made(path: str, name: str) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"{path}:{name}: there is no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    sys.path.insert(0, str(Path(path).resolve().parent))  # as `python FILE.py` does
    spec.loader.exec_module(module)
    made = getattr(module, name, None)
    if made is None:
        raise ConfigError(f"{path} has no {name!r}", advice="NAME is a module, or makes one")
    is_module = hasattr(made, "named_parameters") and not isinstance(made, type)
    return made if is_module else made()


def encode(model: CompiledModel, text: str, *, special_tokens: bool = True) -> list[int]:
    """Return the token ids of `text`; ConfigError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ConfigError("the model has no tokenizer", advice="name one with --tokenizer FOLDER")
    return model.tokenizer.encode(text, add_special_tokens=special_tokens)


@dataclass
class Timing:
    """Times of one streamed answer, in microseconds; None where there was no such token."""

    num_prompt_tokens: int
    num_tokens: int = 0
    first_token_us: float | None = None
    process_to_first_token_us: float | None = None
    us_per_token: float | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    def __str__(self) -> str:
        cached = ""
        if self.num_cached_tokens:
            cached = f", {self.num_cached_tokens} of them from the prefix cache"
        lines = [f"prompt       {self.num_prompt_tokens} tokens{cached}"]
        if self.first_token_us is not None:
            line = f"first token  {self.first_token_us / 1e3:.1f} ms after the request"
            if self.process_to_first_token_us is not None:
                line += f", {self.process_to_first_token_us / 1e3:.0f} ms after the process started"
            lines.append(line)
        rate = "" if self.us_per_token is None else f", {self.us_per_token:.0f} us a token"
        lines.append(f"output       {self.num_tokens} tokens{rate}")
        return "\n".join(lines)


def stream_timed(
    model: CompiledModel, ids: list[int], sampling: dict[str, Any], show: Callable[[str], None]
) -> tuple[str, str | None, Timing]:
    """Stream an answer through `show`; return its text, its finish reason and its timing."""
    timing = Timing(len(ids))
    pieces: list[str] = []
    reason = None
    begin = time.perf_counter()
    first = last = begin
    num_first = 0
    stream = model.stream(ids, **sampling)
    for chunk in stream:
        last = time.perf_counter()
        if chunk.token_ids and timing.first_token_us is None:
            first, num_first = last, len(chunk.token_ids)
            timing.first_token_us = (first - begin) * 1e6
            age = process_age_seconds()
            timing.process_to_first_token_us = None if age is None else age * 1e6
        timing.num_tokens += len(chunk.token_ids)
        reason = chunk.finish_reason or reason
        pieces.append(chunk.text)
        show(chunk.text)
    timing.num_cached_tokens = stream.output().metrics.num_cached_tokens
    if timing.num_tokens > num_first:
        timing.us_per_token = (last - first) * 1e6 / (timing.num_tokens - num_first)
    return "".join(pieces), reason, timing


def show_text(text: str) -> None:
    """Write text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def process_age_seconds() -> float | None:
    """Return the seconds since this process was started (to 10 ms), or None off Linux."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
