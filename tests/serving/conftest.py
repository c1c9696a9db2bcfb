"""The example checkpoint, compiled once a worker; artefacts and objects are shared by all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import aios_compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare"
DRAFT = EXAMPLE.with_name("shakespeare-draft")
OPTIONS = {"num_threads": 1, "progress": False}
PROMPTS = [
    "ROMEO:",
    "JULIET:\nO Romeo, Romeo! wherefore art thou",
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "To be, or not to be",
    "KING RICHARD III:\n",
    "What",
]


@pytest.fixture(scope="session")
def example() -> Iterator[aios_compile.CompiledModel]:
    with aios_compile.load_and_compile(EXAMPLE, **OPTIONS) as model:
        yield model
