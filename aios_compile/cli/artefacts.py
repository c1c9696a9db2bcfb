"""`aios report`, `dump`, `cache ls | rm | path` and `env`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile import env
from aios_compile.cli.options import JsonOption, ModelArgument
from aios_compile.cli.output import folder_bytes, human_bytes, print_json, print_table
from aios_compile.cli.session import load
from aios_compile.errors import CacheError

CacheDir = Annotated[str, typer.Option(help="folder of the artefact cache", show_default=False)]


def report(model: ModelArgument, options: dict[str, Any], as_json: JsonOption = False) -> None:
    """Print what each pass did: hits, refusals, time, nodes, error and budget."""
    with load(model, options) as loaded:
        result, summary = loaded.report(), loaded.progress.summary()
    if as_json:
        print_json(result)
    else:
        print(result)
        print(f"\nstart\n{summary}", file=sys.stderr)


def dump(
    model: ModelArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    options: dict[str, Any],
    as_json: JsonOption = False,
) -> None:
    """Write every level, kernel, plan and certificate of MODEL to the folder OUT."""
    with load(model, options) as loaded:
        loaded.dump(out)
    path = Path(out).absolute()
    if as_json:
        print_json({"path": path, "bytes": folder_bytes(path)})
    else:
        print(path)


def cache_ls(as_json: JsonOption = False, cache_dir: CacheDir = "") -> None:
    """List the compiled artefacts, the most recently used first."""
    entries = _cache(cache_dir).entries()
    if as_json:
        print_json(entries)
        return
    rows = [
        (e.key[:12], human_bytes(e.bytes), _ago(e.last_used), "yes" if e.in_use else "", e.source)
        for e in entries
    ]
    print_table(("key", "size", "used", "in use", "model"), rows)
    print(f"{len(entries)} artefacts, {human_bytes(sum(e.bytes for e in entries))}")


def cache_rm(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="first characters of a key")] = "",
    as_json: JsonOption = False,
    cache_dir: CacheDir = "",
) -> None:
    """Remove one artefact, or all that no process uses."""
    gone, kept = _cache(cache_dir).remove(key)
    if key and not gone and not kept:
        raise CacheError(f"no artefact has a key that starts with {key!r}", advice="aios cache ls")
    if as_json:
        print_json({"removed": gone, "in_use": kept})
        return
    print(f"removed {len(gone)} artefacts, {human_bytes(sum(e.bytes for e in gone))}")
    for entry in kept:
        print(f"kept {entry.key[:12]} ({entry.source}): a process uses it")


def cache_path(as_json: JsonOption = False, cache_dir: CacheDir = "") -> None:
    """Print the folder of the artefact cache."""
    from aios_compile.codegen.cache import STORE, default_root

    path = default_root(cache_dir) / STORE
    if as_json:
        print_json({"path": path})
    else:
        print(path)


def show_env(as_json: JsonOption = False) -> None:
    """Print every variable that is read, and what this machine has."""
    from aios_compile.codegen.cache import default_root
    from aios_compile.codegen.cache_key import compiler_version, versions
    from aios_compile.codegen.cpp.build import Target

    variables = [
        {"name": v.name, "value": v.get(), "set": v.name in os.environ, "help": v.help}
        for v in env.VARIABLES
    ]
    found = {**versions(), "c++": compiler_version(), "target": Target.host().name}
    found |= {"cores": str(len(os.sched_getaffinity(0))), "cache": str(default_root())}
    if as_json:
        print_json({"variables": variables, "machine": found})
        return
    rows = [(str(v["name"]), str(v["value"]) or "-", str(v["help"])) for v in variables]
    print_table(("variable", "value", "meaning"), rows)
    print()
    print_table(("machine", "found"), found.items())


def _cache(cache_dir: str) -> Any:
    from aios_compile.codegen.cache import ArtefactCache, default_root

    return ArtefactCache(default_root(cache_dir))


def _ago(seconds_since_epoch: float) -> str:
    age = max(0.0, time.time() - seconds_since_epoch)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= length:
            return f"{age / length:.0f} {unit} ago"
    return f"{age:.0f} s ago"
