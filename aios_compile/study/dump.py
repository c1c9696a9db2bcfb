"""Write what a compile did to a folder that a browser opens: levels, kernels, plan, certificates.

`Dumper` prints the levels while the passes run (with torch); they become part of the artefact.
`dump_artefact` copies and explains an artefact that exists, without torch.
"""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_compile.errors import CacheError
from aios_compile.study.memory_picture import bytes_text, memory_svg
from aios_compile.study.report import Report

if TYPE_CHECKING:
    from aios_compile.ir.module import IRModule

LEVELS, KERNELS, RECIPES = "levels", "kernels", "recipes.txt"
_STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
pre{background:#f6f6f6;padding:1em;overflow-x:auto;font-size:13px;line-height:1.35}
code{background:#f6f6f6}img{max-width:100%;border:1px solid #ddd}li{margin:.2em 0}
.note{color:#666}"""


class Dumper:
    """Writes the program as a numbered, runnable Python file after every pass that changed it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._count = 0

    def level(self, name: str, module: IRModule) -> None:
        """Write NN_name.py, and the recipes of the weights as they are now."""
        from aios_compile.ir.printer import to_python

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        what = "as captured" if not self._count else f"after {name}"
        title = f"The program {what} (number {self._count})."
        path = self.folder / f"{self._count:02d}_{name}.py"
        path.write_text(to_python(module, title), encoding="utf-8")
        lines = [f"{holder} = {recipe.text()}" for holder, recipe in module.weights.items()]
        (self.folder / RECIPES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._count += 1


def dump_artefact(artefact: Path, folder: Path) -> Path:
    """Copy the readable parts of an artefact to `folder`, draw the plan; return its index.html.

    Raises CacheError when `folder` exists and is not a folder that an earlier dump wrote.
    """
    if folder.exists() and (not folder.is_dir() or _is_foreign(folder)):
        raise CacheError(
            f"{folder} exists and is no dump of this program", advice="choose a folder of its own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for part in (LEVELS, KERNELS):
        shutil.rmtree(folder / part, ignore_errors=True)
        if (artefact / part).is_dir():
            shutil.copytree(artefact / part, folder / part)
    recipes = folder / LEVELS / RECIPES
    if recipes.exists():
        recipes.replace(folder / RECIPES)
    for name in ("plan.json", "program.json", "step.cpp", "launches.txt"):
        if (artefact / name).exists():
            shutil.copyfile(artefact / name, folder / name)
    plan = _read(artefact / "plan.json")
    if plan is not None:
        (folder / "memory.svg").write_text(memory_svg(plan), encoding="utf-8")
    report = Report.from_json(_read(artefact / "report.json") or {"passes": []})
    (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    certificates = json.dumps(_read(artefact / "certificates.json") or [], indent=1)
    (folder / "certificates.json").write_text(certificates, encoding="utf-8")
    index = folder / "index.html"
    index.write_text(_index(folder, report, plan), encoding="utf-8")
    return index


def _is_foreign(folder: Path) -> bool:
    return any(folder.iterdir()) and not (folder / "report.txt").exists()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _index(folder: Path, report: Report, plan: Any) -> str:
    """Return the page that leads through the folder, in the order of the compile."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>aios_compile dump</title>",
        f"<style>{_STYLE}</style><h1>What the compiler did</h1>",
        "<p>The program goes through the passes below, then each node becomes a generated kernel, "
        "then the buffers get their places. Every level is a Python file that runs.</p>",
        f"<h2>1. Passes</h2><pre>{escape(str(report))}</pre>",
        "<p class='note'>error: largest difference from float64, relative to the largest value; "
        "budget: what the program before the pass and its tier allow. All numbers: "
        "<a href='certificates.json'>certificates.json</a></p>",
        f"<h2>2. Levels</h2>{_levels(folder, report)}",
    ]
    if (folder / RECIPES).exists():
        parts.append(
            f"<p>How each weight is made of the checkpoint: <a href='{RECIPES}'>{RECIPES}</a></p>"
        )
    parts.append(f"<h2>3. Kernels</h2>{_kernels(folder)}")
    if plan is not None:
        parts.append(
            f"<h2>4. Memory</h2><p>{bytes_text(plan['arena_bytes'])} in one arena "
            f"(<a href='plan.json'>plan.json</a>).</p><img src='memory.svg' alt='memory plan'>"
        )
    return "\n".join([*parts, "</html>", ""])


def _levels(folder: Path, report: Report) -> str:
    rows = {p.name: p for p in report.passes}
    items = []
    for path in sorted((folder / LEVELS).glob("*.py")):
        row = rows.get(path.stem[3:])
        what = ""
        if row is not None:
            deltas = (row.op_deltas or {}).items()
            changes = ", ".join(f"{n:+d} {name}" for name, n in deltas)
            what = escape(f": {row.hits} rewrites; {changes}" if changes else f": {row.hits} hits")
        items.append(f"<li><a href='{LEVELS}/{path.name}'>{path.name}</a>{what}</li>")
    return f"<ul>{''.join(items)}</ul><p>Run one: <code>python {LEVELS}/NAME.py</code></p>"


def _kernels(folder: Path) -> str:
    items = []
    for path in sorted((folder / KERNELS).glob("*")):
        size = bytes_text(path.stat().st_size)
        items.append(f"<li><a href='{KERNELS}/{path.name}'>{path.name}</a> ({size})</li>")
    for name in ("step.cpp", "launches.txt"):
        if (folder / name).exists():
            items.append(f"<li><a href='{name}'>{name}</a>: the order of the launches</li>")
    return f"<ul>{''.join(items)}</ul>"
