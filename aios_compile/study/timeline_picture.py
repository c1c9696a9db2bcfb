"""A picture of a simulation: requests that run and wait, and pages in use, over time. Plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 960, 220, 50
COLOURS = {"running": "#2b6cb0", "waiting": "#c05621", "pages": "#2f855a"}
MOST_POINTS = 2000


def write_timeline(timeline: Sequence[tuple[float, int, int, int]], path: Path) -> None:
    """Write one panel a column below each other; a long timeline is thinned out."""
    points = timeline[:: max(1, len(timeline) // MOST_POINTS)]
    panels = []
    for index, name in enumerate(COLOURS):
        values = [(point[0], float(point[index + 1])) for point in points]
        panels.append(_panel(name, values, index * (HEIGHT + MARGIN)))
    size = f'width="{WIDTH + 2 * MARGIN}" height="{len(panels) * (HEIGHT + MARGIN) + MARGIN}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    path.write_text("\n".join([head, *panels, "</svg>"]) + "\n", encoding="utf-8")


def _panel(name: str, values: Sequence[tuple[float, float]], top: int) -> str:
    begin = values[0][0] if values else 0.0
    span = max(1.0, values[-1][0] - begin) if values else 1.0
    most = max([1.0, *(value for _, value in values)])
    base = top + MARGIN + HEIGHT

    def place(at_us: float, value: float) -> str:
        return f"{MARGIN + (at_us - begin) / span * WIDTH:.1f},{base - value / most * HEIGHT:.1f}"

    line = " ".join(place(*value) for value in values)
    label = f"{name}, at most {most:.0f}; {span / 1e6:.1f} s from left to right"
    return (
        f'<text x="{MARGIN}" y="{top + MARGIN - 8}" font-size="14">{label}</text>'
        f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>'
        f'<line x1="{MARGIN}" y1="{base}" x2="{MARGIN + WIDTH}" y2="{base}" stroke="#888"/>'
    )
