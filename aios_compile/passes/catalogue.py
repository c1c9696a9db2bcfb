"""docs/passes.md, generated from the passes themselves: nothing in it is typed twice."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from aios_compile.passes.examples import example_of
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.runner import Stage

_HEAD = """# Passes

Generated from `aios_compile/passes`. The order is that of `pipeline.py`. The test suite runs each
Before and After block.

numerics: **exact** keeps the same operations, **reassociates** changes the order of sums, **lossy**
changes values. An optional pass can be left out with `AIOS_DISABLE=name` and is reverted when it
breaks its error budget; a required one fails the compile.
"""


def markdown(stages: Sequence[Stage] | None = None) -> str:
    """Return the catalogue of all passes, in pipeline order."""
    if stages is None:
        from aios_compile.passes.pipeline import STAGES

        stages = STAGES
    parts = [_HEAD, _table(stages)]
    for stage in stages:
        parts.append(f"## To level {int(stage.level_after)}, {stage.level_after.name.lower()}\n")
        parts += [_section(function) for function in stage.passes]
    return "\n".join(parts)


def _table(stages: Sequence[Stage]) -> str:
    rows = ["| pass | numerics | required | what it does |", "|---|---|---|---|"]
    for function in [p for stage in stages for p in stage.passes]:
        info = info_of(function)
        required = "yes" if info.required else ""
        link = f"[`{info.name}`](#{info.name})"
        rows.append(f"| {link} | {info.numerics} | {required} | {_first_line(info.doc)} |")
    return "\n".join([*rows, ""])


def _section(function: PassFunction) -> str:
    info = info_of(function)
    doc = inspect.cleandoc(info.doc)
    text = doc.split("Before::", 1)[0].strip()
    target = f", {info.target} only" if info.target else ""
    required = "required" if info.required else "optional"
    parts = [f"### {info.name}\n", f"*{info.numerics}, {required}{target}*\n"]
    why = inspect.getdoc(inspect.getmodule(function))
    parts += [f"{why}\n"] if why else []
    parts.append(f"{text}\n")
    example = example_of(function)
    if example is not None:
        parts.append(f"Before:\n\n```python\n{example.before}\n```\n")
        parts.append(f"After:\n\n```python\n{example.after}\n```\n")
    return "\n".join(parts)


def _first_line(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
