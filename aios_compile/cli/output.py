"""What the commands print: text, tables, JSON and errors. Plain text when stdout is no terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aios_compile import env
from aios_compile.errors import AiosError


def is_fancy() -> bool:
    """Return whether stdout is a terminal that wants colours (NO_COLOR is not set)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def plain(value: Any) -> Any:
    """Return `value` as JSON has it: dataclasses and mappings as objects, paths as text.

    A dataclass may say what it shows by a method `as_dict`.
    """
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
        return str(value)  # JSON has no infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; aligned columns of plain text when stdout is no terminal."""
    rows = [list(row) for row in rows]
    if is_fancy():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in [list(columns), *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


def print_error(error: AiosError, as_json: bool) -> None:
    """Print an error on stderr, with --json on stdout; AIOS_DEBUG adds its traceback."""
    if env.DEBUG.get() not in ("", "0"):
        traceback.print_exc()
    if as_json:
        kind = type(error).__name__
        fields = {"type": kind, "message": error.message, "advice": error.advice}
        print_json({"error": {**fields, "source_line": error.source_line}})
    else:
        label = "\x1b[31merror:\x1b[0m" if is_fancy() and sys.stderr.isatty() else "error:"
        print(f"{label} {error}", file=sys.stderr)


def folder_bytes(path: Path) -> int:
    """Return the size of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def human_bytes(count: int) -> str:
    """Return a size for people: 1,536 bytes are "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
