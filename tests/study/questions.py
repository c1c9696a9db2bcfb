"""Commands of docs/study.md: a heading is a question, the first `$ aios` below it answers it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = (
    "Which kernel reads the most bytes a token, and from which source line?",
    "Why was this norm not fused?",
    "What does each pass save?",
    "What happens to memory if T doubles?",
    "Which pass broke the model?",
)


def command_of(question: str) -> list[str]:
    """Return the arguments that docs/study.md gives `aios` below a question."""
    text = (ROOT / "docs" / "study.md").read_text()
    _, found, answer = text.partition(f"\n### {question}\n")
    assert found, f"docs/study.md does not ask: {question}"
    (command,) = re.findall(r"^\$ aios (.*)$", answer.partition("\n### ")[0], re.M)[:1]
    return shlex.split(command)


def largest_kernel(output: str) -> tuple[str, str]:
    """Return the name and the model line of the first kernel in the doctor's table."""
    found = re.search(r"bytes a token  launches  kernel\n +([\d,]+) +\d+  (\S+) +(.*)", output)
    assert found, output
    rows = re.findall(r"^ +([\d,]+) +\d+  \w+ +\w+\.py:\d+", output, re.M)
    sizes = [int(row.replace(",", "")) for row in rows]
    assert len(sizes) > 9 and sizes[0] == max(sizes) == int(found[1].replace(",", ""))
    return found[2], found[3]
