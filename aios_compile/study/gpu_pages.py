"""Pages that lead from a kernel's SASS and PTX to its Triton source, its graph and the model.

A line of PTX or SASS links to the Triton line that it comes from (ptxas keeps `.loc`), a Triton
line to the nodes of the kernel's body that it computes (line_nodes.py), a node to its lines of the
model; a link's tooltip says the rest of the way. The sources in the folder get the same as
comments: no line moves. SASS is read with the nvdisasm of the triton wheel; AMD's assembly is one
text.
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
from aios_compile.study.gpu_compile import KernelReport, LineNodes, StepReport
from aios_compile.study.line_nodes import BodyNode, annotated

STYLE = """<style>
body{font:14px sans-serif;margin:1em} table{border-collapse:collapse} td,th{padding:2px 8px}
td{text-align:right} td:first-child,td:last-child{text-align:left}
tr:nth-child(even){background:#eee}
.columns{display:flex;gap:1em} .columns>div{flex:1;overflow:auto;height:75vh}
pre{margin:4px} pre a{color:#888;text-decoration:none} pre a:hover{color:#06c}
pre.graph{max-height:18vh;overflow:auto;background:#f4f4f4;padding:4px} :target{background:#fd8}
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
        "ledger": report.ledger, "kernels": [k.as_dict() for k in report.kernels],
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
            "<br>".join(escape(line) for line in kernel.row.model_lines),
        ]  # fmt: skip
        rows.append("".join(f"<td>{c}</td>" for c in cells))
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<!doctype html><meta charset='utf-8'>{STYLE}{head}<table>{table}</table>\n"


def _kernel_page(kernel: KernelReport, out: Path) -> str:
    place = out / f"{kernel.row.symbol}.py"
    source = place.read_text(encoding="utf-8")
    place.write_text(annotated(source, kernel.nodes), encoding="utf-8")
    parts, nodes = [], kernel.nodes
    for binary in kernel.binaries:
        rows = "any number of rows" if binary.most is None else f"up to {binary.most} rows"
        parts.append(
            f"<h3>{escape(binary.kernel)}</h3><p>{rows}; {escape(str(binary.constexprs))}; "
            f"{binary.num_warps} warps, {binary.registers} registers, {binary.spill_bytes} bytes "
            f"spilled, {binary.shared_bytes} bytes of shared memory</p>"
        )
        cuda = binary.text.endswith(".ptx")
        parts.append(_text("PTX" if cuda else "assembly", ptx_lines(binary, nodes)))
        if cuda:
            parts.append(_text("SASS", sass_lines(binary, nodes)))
    graph = f"<pre class='graph'>{chr(10).join(_graph_lines(kernel))}</pre>"
    left = _text("Triton", _source_lines(source, nodes))
    body = f"<h2>{escape(kernel.row.name)}</h2>{graph}<div class='columns'><div>{left}</div><div>"
    return f"<!doctype html><meta charset='utf-8'>{STYLE}{body}{''.join(parts)}</div></div>\n"


def _text(title: str, lines: Iterable[str]) -> str:
    return f"<b>{title}</b><pre>{chr(10).join(lines)}</pre>"


def _graph_lines(kernel: KernelReport) -> list[str]:
    """Return the model's lines, then the nodes of the body, each with links to its model lines."""
    places = {line: i for i, line in enumerate(kernel.row.model_lines, 1)}
    lines = [f"<span id='M{i}'>{escape(line)}</span>" for line, i in places.items()]
    for node in dict.fromkeys(node for nodes in kernel.nodes.values() for node in nodes):
        known = [x for x in node.model_lines if x in places]
        links = [f"<a href='#M{places[x]}'>{escape(x.partition(' in ')[0])}</a>" for x in known]
        call = escape(f"{node.name} = {node.call}")
        lines.append(f"<span id='N{escape(node.name)}'>{call}</span>  {' '.join(links)}")
    return lines


def _source_lines(source: str, nodes: LineNodes) -> list[str]:
    """Return the Triton lines; a run of lines of the same nodes is linked to them at its end."""
    lines, last = list[str](), tuple[BodyNode, ...]()
    for i, text in enumerate(source.split("\n"), 1):
        own = nodes.get(i, ())
        links = [
            f"<a href='#N{escape(n.name)}' title='{_told(n)}'>{escape(n.name)}</a>"
            for n in (own if own != last else ())
        ]
        last = own or last
        mark = f"   &lt;- {' '.join(links)}" if links else ""
        lines.append(f"<span id='L{i}'>{i:4} {escape(text)}{mark}</span>")
    return lines


def _told(node: BodyNode) -> str:
    return escape("; ".join(node.model_lines), quote=True)


def _linked(text: str, line: int, nodes: LineNodes) -> str:
    """Return a line with a link to its source line, whose tooltip names nodes and model lines."""
    if not line:
        return "     " + escape(text)
    told = escape("; ".join(node.told() for node in nodes.get(line, ())), quote=True)
    title = f" title='{told}'" if told else ""
    return f"<a href='#L{line}'{title}>{line:4}</a> {escape(text)}"


def ptx_lines(binary: Binary, nodes: LineNodes) -> list[str]:
    """Return the lines of PTX (or AMD assembly), each with a link to its source line."""
    lines, at = [], 0
    for text in binary.assembly().split("\n"):
        found = LOC.match(text)
        if found:
            at = int(found.group(1))
        elif text.startswith("\t.section"):  # debugging data, no code
            break
        else:
            lines.append(_linked(text, at, nodes))
    return lines


def sass_lines(binary: Binary, nodes: LineNodes) -> list[str]:
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
            lines.append(_linked(text.strip(), at, nodes))
    return lines
