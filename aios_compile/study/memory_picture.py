"""Draw the memory plan as an SVG: lifetimes from left to right, offsets from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP = 1000, 520, 70, 60
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")


def memory_svg(plan: Mapping[str, Any]) -> str:
    """Return the picture of a plan: {arena_bytes, naive_bytes, lower_bound_bytes, buffers}.

    A buffer is a box from its first to its last phase, at its offset, as high as its bytes; the
    dashed line is the lower bound, the most bytes that are alive at once.
    """
    buffers = list(plan["buffers"])
    arena = max(1, int(plan["arena_bytes"]))
    phases = 1 + max((int(b["last"]) for b in buffers), default=0)
    bound = int(plan["lower_bound_bytes"])

    def x(phase: float) -> float:
        return _LEFT + phase * (_WIDTH - _LEFT - 20) / phases

    def y(offset: float) -> float:
        return _TOP + offset * (_HEIGHT - _TOP - 40) / arena

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">Memory plan: {_summary(plan)}</text>',
        f'<text x="{_LEFT}" y="40">left to right: phases of a step; top to bottom: offsets</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{x(phases) - _LEFT:.1f}" '
        f'height="{y(arena) - _TOP:.1f}" fill="#f4f4f4" stroke="#888"/>',
    ]
    for i, b in enumerate(sorted(buffers, key=lambda b: (b["offset"], b["first"]))):
        left, top = x(b["first"]), y(b["offset"])
        width, height = x(b["last"] + 1) - left, max(0.5, y(b["offset"] + b["bytes"]) - top)
        name = escape(str(b["name"]))
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{_COLOURS[i % len(_COLOURS)]}" fill-opacity="0.8" stroke="white">'
            f"<title>{name}: {b['bytes']:,} bytes at {b['offset']:,}, phases {b['first']} to "
            f"{b['last']}</title></rect>"
        )
        if height > 14 and width > 7 * len(name):
            parts.append(f'<text x="{left + 4:.1f}" y="{top + 13:.1f}" fill="white">{name}</text>')
    parts.append(
        f'<line x1="{_LEFT}" x2="{x(phases):.1f}" y1="{y(min(bound, arena)):.1f}" '
        f'y2="{y(min(bound, arena)):.1f}" stroke="black" stroke-dasharray="6 4"/>'
        f'<text x="4" y="{y(min(bound, arena)) - 4:.1f}">lower bound</text>'
        f'<text x="4" y="{_TOP + 4}">0</text>'
        f'<text x="4" y="{y(arena) + 14:.1f}">{bytes_text(arena)}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">phase 0</text>'
        f'<text x="{x(phases) - 60:.1f}" y="{_HEIGHT - 8}">phase {phases - 1}</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _summary(plan: Mapping[str, Any]) -> str:
    arena, naive = int(plan["arena_bytes"]), int(plan["naive_bytes"])
    bound = int(plan["lower_bound_bytes"])
    ratio = f" ({arena / bound:.2f}x of it)" if bound else ""
    return (
        f"{bytes_text(arena)} for {len(plan['buffers'])} buffers; without sharing "
        f"{bytes_text(naive)}; lower bound {bytes_text(bound)}{ratio}"
    )


def bytes_text(count: int) -> str:
    """Return "12.3 MiB" for a number of bytes."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
