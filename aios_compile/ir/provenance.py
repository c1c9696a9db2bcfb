"""Where a node comes from: the model's source line and module path, kept through every pass."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import fx

KEYS = ("stack_trace", "nn_module_stack")
# Files that serve all models, whose lines say nothing: torch, and transformers' own layers.
_SHARED = re.compile(
    r"[/\\](site|dist)-packages[/\\]"
    r"(torch[/\\]|transformers[/\\](integrations|activations\.py|pytorch_utils\.py))"
)
_CAPTURE = str(Path(__file__).parents[1] / "capture")  # stands in for the model's attention
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def _frame(node: fx.Node) -> tuple[str, str, str, str] | None:
    """Return the innermost frame of the model: a line of torch's functional.py says nothing, nor
    does what capture puts in the place of a library's attention.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not (_SHARED.search(f[0]) or f[0].startswith(_CAPTURE))] or frames
    return own[-1] if own else None


def source_line(node: fx.Node) -> str:
    """Return `file.py:123 in forward: the source text` of the innermost model frame, or ""."""
    frame = _frame(node)
    if frame is None:
        return ""
    path, line, function, text = frame
    return f"{path.rsplit('/', 1)[-1]}:{line} in {function}: {text.strip()}"


def place(node: fx.Node) -> str:
    """Return the module path and the source line: one line may serve many modules (a norm's)."""
    return ", ".join(filter(None, [module_path(node), source_line(node)]))


def source_file(node: fx.Node) -> tuple[str, int] | None:
    """Return (path, line) of the innermost model frame."""
    frame = _frame(node)
    return (frame[0], int(frame[1])) if frame else None


def module_path(node: fx.Node) -> str:
    """Return the module path, with the layer index of a region shown as `*`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    path = re.sub(r"L\['(?:self|model|[^']*)'\]\.?", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\['?(\d+)'?\]", r".\1", path)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path).strip(".")


def inherit(node: fx.Node, sources: Iterable[fx.Node]) -> None:
    """Give a new node the provenance of the first source that has one; remember all lines.

    Sources without any (a weight that is cast) count as read where they are first used.
    """
    given = list(sources)
    if not any(source_lines(source) for source in given):
        given += [user for source in given for user in source.users if source_lines(user)][:1]
    lines: list[str] = []
    for source in given:
        for key in KEYS:
            if source.meta.get(key) and not node.meta.get(key):
                node.meta[key] = source.meta[key]
        for line in source.meta.get("source_lines", ()) or filter(None, [source_line(source)]):
            if line not in lines:
                lines.append(line)
    node.meta["source_lines"] = tuple(lines)


def source_lines(node: fx.Node) -> tuple[str, ...]:
    """Return every model line that a node computes (several after fusion)."""
    lines: tuple[str, ...] = node.meta.get("source_lines", ())
    return lines or tuple(filter(None, [source_line(node)]))
