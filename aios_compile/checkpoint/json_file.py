"""Read JSON from outside: size, depth, duplicate keys and non-finite numbers are all checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from aios_compile.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file of at most `max_bytes`. Raises CheckpointError."""
    return parse_json(read_bytes(path, max_bytes), str(path))


def read_text(path: Path, max_bytes: int) -> str:
    """Return a UTF-8 text file of at most `max_bytes`. Raises CheckpointError."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file of at most `max_bytes`; the size is checked before reading."""
    try:
        with path.open("rb") as file:
            data = file.read(min(max_bytes, path.stat().st_size) + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, the limit for this file")
    return data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`; `where` names it in errors. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise CheckpointError(f"{where}: the key {twice!r} stands twice in one object")
        return result

    def constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: {name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: the number {text[:40]} is out of range")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=number,
        )
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply to be JSON of a model") from None
    except ValueError as error:  # malformed JSON, bad UTF-8, an integer of thousands of digits
        raise CheckpointError(f"{where}: not valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a {type(value).__name__}, expected a JSON object")
    return value
