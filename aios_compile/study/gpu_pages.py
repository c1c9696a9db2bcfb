"""Pages that put a kernel's Triton source, PTX and SASS side by side, linked line by line.

A line of PTX or SASS links to the source line that it comes from (ptxas keeps `.loc`), and the
source's head names the model's lines. SASS is read with the nvdisasm of the triton wheel; AMD's
assembly is one text.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from html import escape
from pathlib import Path

from aios_compile.codegen.triton.compile_ahead import Binary
from aios_compile.errors import BuildError
from aios_compile.study.gpu_compile import KernelReport, StepReport

STYLE = """<style>
body{font:14px sans-serif;margin:1em} table{border-collapse:collapse} td,th{padding:2px 8px}
td{text-align:right} td:first-child,td:last-child{text-align:left}
tr:nth-child(even){background:#eee}
.columns{display:flex;gap:1em} .columns>div{flex:1;overflow:auto;height:90vh}
pre{margin:4px} pre a{color:#888;text-decoration:none} :target{background:#fd8}
</style>"""
LOC = re.compile(r"\s*\.loc\s+\d+\s+(\d+)")
SASS_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')


def write_pages(report: StepReport, out: Path) -> Path:
    """Write index.html, a page a kernel and report.json below `out`; return the index."""
    for kernel in report.kernels:
        (out / f"{kernel.row.name}.html").write_text(_kernel_page(kernel, out), encoding="utf-8")
    data = {
        "target": report.target, "card": report.card, "launches": report.launches,
        "floor_us": report.floor_us, "predicted_us": report.predicted_us, "memory": report.memory,
        "kernels": [k.as_dict() for k in report.kernels],
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    index = out / "index.html"
    index.write_text(_index(report), encoding="utf-8")
    return index


def _index(report: StepReport) -> str:
    head = (
        f"<h1>{escape(report.target)} ({escape(report.card)})</h1><p>Decode of one sequence: "
        f"{report.launches} launches, floor {report.floor_us:.0f} us, predicted "
        f"{report.predicted_us:.0f} us ({report.floor_us / report.predicted_us:.0%}).</p>"
        f"<pre>{escape(report.memory)}</pre>"
    )
    names = "kernel calls launches bytes floor_us predicted_us roofline registers spills shared "
    names += "resident"
    rows = ["".join(f"<th>{n}</th>" for n in [*names.split(), "model"])]
    for kernel in report.kernels:
        used = kernel.decode_binaries()
        cells = [
            f"<a href='{kernel.row.name}.html'>{escape(kernel.row.name)}</a>",
            kernel.calls, kernel.launches, f"{kernel.bytes:,}", f"{kernel.floor_us:.2f}",
            f"{kernel.predicted_us:.2f}", f"{kernel.share:.0%}",
            "/".join(str(b.registers) for b in used), "/".join(str(b.spill_bytes) for b in used),
            "/".join(str(b.shared_bytes) for b in used),
            "/".join(f"{h.programs} ({h.limit})" for h in kernel.held),
            escape("; ".join(kernel.row.model_lines[:2])),
        ]  # fmt: skip
        rows.append("".join(f"<td>{c}</td>" for c in cells))
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<!doctype html><meta charset='utf-8'>{STYLE}{head}<table>{table}</table>\n"


def _kernel_page(kernel: KernelReport, out: Path) -> str:
    source = (out / f"{kernel.row.symbol}.py").read_text(encoding="utf-8")
    parts = []
    for binary in kernel.binaries:
        rows = "any number of rows" if binary.most is None else f"up to {binary.most} rows"
        parts.append(
            f"<h3>{escape(binary.kernel)}</h3><p>{rows}; {escape(str(binary.constexprs))}; "
            f"{binary.num_warps} warps, {binary.registers} registers, {binary.spill_bytes} bytes "
            f"spilled, {binary.shared_bytes} bytes of shared memory</p>"
        )
        cuda = binary.text.endswith(".ptx")
        parts.append(_text("PTX" if cuda else "assembly", ptx_lines(binary)))
        if cuda:
            parts.append(_text("SASS", sass_lines(binary)))
    title, lines = escape(kernel.row.name), escape("; ".join(kernel.row.model_lines))
    left = _text("Triton", _source_lines(source))
    body = f"<h2>{title}</h2><p>{lines}</p><div class='columns'><div>{left}</div><div>"
    return f"<!doctype html><meta charset='utf-8'>{STYLE}{body}{''.join(parts)}</div></div>\n"


def _text(title: str, lines: Iterable[str]) -> str:
    return f"<b>{title}</b><pre>{chr(10).join(lines)}</pre>"


def _source_lines(source: str) -> list[str]:
    lines = source.split("\n")
    return [f"<span id='L{i}'>{i:4} {escape(x)}</span>" for i, x in enumerate(lines, 1)]


def _linked(text: str, line: int) -> str:
    mark = f"<a href='#L{line}'>{line:4}</a> " if line else "     "
    return mark + escape(text)


def ptx_lines(binary: Binary) -> list[str]:
    """Return the lines of PTX (or AMD assembly), each with a link to its source line."""
    lines, at = [], 0
    for text in binary.assembly().split("\n"):
        found = LOC.match(text)
        if found:
            at = int(found.group(1))
        elif text.startswith("\t.section"):  # debugging data, no code
            break
        else:
            lines.append(_linked(text, at))
    return lines


def sass_lines(binary: Binary) -> list[str]:
    """Return the lines of SASS, each with a link to its source line, and write them beside the PTX.

    Raises BuildError when nvdisasm fails.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(tool), "-g", "-c", binary.binary]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"nvdisasm of {binary.kernel}: {done.stderr.strip()[-500:]}")
    Path(binary.text).with_suffix(".sass").write_text(done.stdout, encoding="utf-8")
    lines, at = [], 0
    for text in done.stdout.split("\n"):
        found = SASS_LINE.search(text)
        if found:
            at = int(found.group(2)) if found.group(1).endswith(".py") else 0
        elif "/*" in text:
            lines.append(_linked(text.strip(), at))
    return lines
