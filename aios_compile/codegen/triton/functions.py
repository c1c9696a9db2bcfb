"""Functions that Triton's language lacks, written into the modules that call them.

Rare ones compute in float64, which every card has; none depends on a library of one vendor, so
that the interpreter runs them too. Errors: tests/codegen/test_triton_functions.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "templates" / "functions.py.txt"
CALL = re.compile(r"(?<!def )\b(\w+)\b(?=[(,)])")


@cache
def functions() -> dict[str, str]:
    """Return the text of each function by its name, those that are called before their callers."""
    texts = FILE.read_text().rstrip("\n").split("\n\n\n")
    return {re.findall(r"^def (\w+)", text, re.M)[0]: text for text in texts}


def called_by(texts: Sequence[str]) -> list[str]:
    """Return the functions that texts call, and those that these call; not what they define."""
    every, defined = functions(), {n for t in texts for n in re.findall(r"^def (\w+)", t, re.M)}
    wanted, todo = set[str](), list(texts)
    while todo:
        names = {n for n in CALL.findall(todo.pop()) if n in every} - wanted - defined
        wanted |= names
        todo += [every[name] for name in names]
    return [text for name, text in every.items() if name in wanted]
