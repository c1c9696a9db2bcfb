"""Mutants of generated code: C++ and Triton, in the texts of emitters and in templates.

Line by line, with the operators of the Python mutants. Comments, preprocessor lines, prefetches,
alignment and inlining hints are left out: they change no result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

SWAPS: tuple[tuple[str, str, str], ...] = (
    ("comparison", r" < ", " <= "), ("comparison", r" <= ", " < "), ("comparison", r" > ", " >= "),
    ("comparison", r" >= ", " > "), ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("arithmetic", r" \+ ", " - "), ("arithmetic", r" - ", " + "), ("arithmetic", r" \* ", " + "),
    ("arithmetic", r" / ", " * "), ("arithmetic", r" % ", " * "), ("arithmetic", r" // ", " * "),
    ("arithmetic", r" \+= ", " -= "), ("and/or", r" && ", " || "), ("and/or", r" \|\| ", " && "),
    ("and/or", r" and ", " or "), ("and/or", r" or ", " and "), ("arithmetic", r" & ", " | "),
    ("arithmetic", r" << ", " >> "), ("arithmetic", r" >> ", " << "),
    ("call", r"\bmax\(", "min("), ("call", r"\bmin\(", "max("),
    ("call", r"\bmaximum\(", "minimum("), ("call", r"\bminimum\(", "maximum("),
)  # fmt: skip
CONSTANT = re.compile(r"(?<![\w.{<])(\d+)(?![\w.}>])")
CODE = re.compile(r"[;=(){}\[\]]|return|\bif\b| [-+*/<>&|]")
NO_CODE = re.compile(
    r"^\s*(//|#|@|\*|assert\b|static_assert|template\b|using\b|import\b)|prefetch|alignas|"
    r"num_warps|num_stages|multiple_of|max_contiguous|evict|cache_modifier"
)
DROPPED = re.compile(r"^\s*(?!return|const|float |int|auto|for|if|else|while|break|struct|V |\})"
                     r"[\w\[\]>.*&()-]+(\(.*\)| [-+*/|&]?= .*);\s*$")  # fmt: skip

STORED = re.compile(r"^\s*tl\.(store|atomic_\w+)\(.*\)$")


class TextMutation(NamedTuple):
    """A changed text: the line that changed (from 0), how, both lines, and the whole new text."""

    line: int
    operator: str
    before: str
    after: str
    text: str


def mutations(text: str) -> Iterator[TextMutation]:
    """Yield the mutants of a text of code; none of a text that is no code."""
    lines = text.split("\n")
    documents = False
    for i, line in enumerate(lines):
        quotes = line.count('"""')
        if quotes or documents:  # the docstring of a template's function
            documents ^= quotes == 1
            continue
        code = re.split(r"\s*(?://|#) |\s*//$", line)[0]
        if NO_CODE.search(line) or not CODE.search(code):
            continue
        for operator, new in _line_mutations(code):
            whole = "\n".join([*lines[:i], new + line[len(code) :], *lines[i + 1 :]])
            yield TextMutation(i, operator, line.strip(), new.strip(), whole)


def _line_mutations(code: str) -> Iterator[tuple[str, str]]:
    for operator, pattern, new in SWAPS:
        for found in re.finditer(pattern, code):
            yield operator, code[: found.start()] + new + code[found.end() :]
    for found in CONSTANT.finditer(code):
        yield "constant", f"{code[: found.start(1)]}{int(found[1]) + 1}{code[found.end(1) :]}"
    if DROPPED.match(code):
        indent = code[: len(code) - len(code.lstrip())]
        yield "drop statement", f"{indent};"
    if STORED.match(code):
        yield "drop statement", f"{code[: len(code) - len(code.lstrip())]}pass"
