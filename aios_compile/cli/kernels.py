"""`aios kernels` and `aios edit`: the generated kernels of a model, and kernels of one's own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import EXIT_MISTAKE, JsonOption, ModelArgument
from aios_compile.cli.output import print_json, print_table
from aios_compile.cli.session import load
from aios_compile.errors import ConfigError

CacheDir = Annotated[str, typer.Option(help="folder of the artefact cache", show_default=False)]


def kernels(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    show: Annotated[str, typer.Option(help="print the text of this kernel")] = "",
) -> None:
    """List the kernels of MODEL: bytes a token, launches, phases, model line; the largest first."""
    from aios_compile.codegen import overrides
    from aios_compile.codegen.cache import default_root
    from aios_compile.study.kernel_table import KERNEL_TABLE, KernelRow, total_bytes

    with load(model, options) as loaded:
        folder = Path(loaded.artefact_path)
        rows = [KernelRow.from_json(row) for row in json.loads((folder / KERNEL_TABLE).read_text())]
        edits = overrides.texts(default_root(options.get("cache_dir")))
        edited = [r.name for r in rows if edits.get(r.name) == _text(folder, r.name)]
        if show:
            print(_text(folder, _one([r.name for r in rows], show)))
            return
    if as_json:
        shown = [{**row.as_dict(), "edited": row.name in edited} for row in rows]
        print_json({"kernels": shown, "bytes_a_token": total_bytes(rows)})
        return
    print_table(
        ("bytes a token", "launches", "phases", "kernel", "model line"),
        [
            (
                f"{row.bytes_a_token:,}",
                str(row.launches),
                ", ".join(row.phases),
                row.name + (" (edited)" if row.name in edited else ""),
                row.model_lines[0] if row.model_lines else "",
            )
            for row in rows
        ],
    )
    print(f"{len(rows)} kernels move {total_bytes(rows):,} bytes a token at batch 1")


def edit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a kernel, or the begin of its name")],
    as_json: JsonOption = False,
    model: Annotated[str, typer.Option(help="compile this model at once: is the edit right?")] = "",
    file: Annotated[str, typer.Option(help="take the text of this file; no editor is opened")] = "",
    revert: Annotated[bool, typer.Option("--revert", help="take the edit back")] = False,
    cache_dir: CacheDir = "",
) -> None:
    """Replace the text of a generated kernel; it is used from now on if it is right.

    The edit lies in the overrides folder of the cache. When a model that has the kernel is
    compiled next, it is built, compared with its reference, timed, and used only if right.
    """
    from aios_compile.codegen import overrides
    from aios_compile.codegen.cache import default_root

    root = default_root(cache_dir)
    if revert:
        name = _one(sorted(overrides.digests(root)), name, "edit")
        overrides.remove(root, name)
        _tell(as_json, {"name": name, "reverted": True}, f"{name} is what the compiler writes")
        return
    found = _kernels_of(model, cache_dir) if model else _generated(root)
    name = _one(sorted(found), name)
    text = _read(file) if file else _edited(found[name], name)
    path = overrides.write(root, name, text)
    verdicts = _verdicts(model, cache_dir, name) if model else []
    shown = {"name": name, "path": path, "verdicts": verdicts}
    refused = any("is not used" in verdict for verdict in verdicts)
    lines = [str(path), *verdicts]
    lines += [f"try: mend that file, or `aios edit {name} --revert`"] if refused else []
    _tell(as_json, shown, "\n".join(lines))
    if refused:
        raise typer.Exit(EXIT_MISTAKE)


def _tell(as_json: bool, value: Any, text: str) -> None:
    if as_json:
        print_json(value)
    else:
        print(text)


def _one(names: list[str], wanted: str, kind: str = "kernel") -> str:
    """Return the name that is meant: exact, or the only one that begins so."""
    fitting = [n for n in names if n == wanted] or [n for n in names if n.startswith(wanted)]
    if len(fitting) != 1:
        what = f"no {kind}" if not fitting else f"{len(fitting)} {kind}s"
        nothing = "none: compile a model first" if kind == "kernel" else "none"
        listed = ", ".join(fitting or names) or nothing
        raise ConfigError(f"{what} named {wanted}...", advice=f"there are {listed}")
    return fitting[0]


def _generated(root: Path) -> dict[str, Path]:
    """Return the newest file of each kernel among the artefacts of the cache."""
    from aios_compile.codegen.artefact import KERNELS
    from aios_compile.codegen.cache import ArtefactCache

    entries = ArtefactCache(root).entries()
    files = [f for e in reversed(entries) for f in (e.path / KERNELS).glob("*.cpp")]
    return {f.stem: f for f in files}


def _kernels_of(model: str, cache_dir: str) -> dict[str, Path]:
    """Return the files of a model's kernels: a short name means one of its own."""
    from aios_compile.codegen.artefact import KERNELS

    with load(model, {"cache_dir": cache_dir} if cache_dir else {}) as loaded:
        return {f.stem: f for f in (Path(loaded.artefact_path) / KERNELS).glob("*.cpp")}


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--file {file}: {error}", advice="name a readable text file") from error


def _text(folder: Path, name: str) -> str:
    from aios_compile.codegen.artefact import KERNELS

    return (folder / KERNELS / f"{name}.cpp").read_text(encoding="utf-8")


def _edited(path: Path, name: str) -> str:
    """Open the text in an editor; return what was saved."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor or not sys.stdin.isatty():
        raise ConfigError(
            "no editor: EDITOR is not set, or this is no terminal",
            advice=f"edit a copy of {path} and give it with --file",
        )
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        copy = Path(folder) / f"{name}.cpp"
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        if subprocess.run([*shlex.split(editor), str(copy)], check=False).returncode:
            raise ConfigError(f"{editor} failed: nothing is changed")
        return copy.read_text(encoding="utf-8")


def _verdicts(model: str, cache_dir: str, name: str) -> list[str]:
    from aios_compile.codegen.artefact import REPORT

    options = {"cache_dir": cache_dir} if cache_dir else {}
    with load(model, options) as loaded:
        notes = json.loads((Path(loaded.artefact_path) / REPORT).read_text())["notes"]
    return [note for note in notes if name in note]
