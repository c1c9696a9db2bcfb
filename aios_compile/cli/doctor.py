"""`aios doctor`: what would be compiled, without weights and without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import EXIT_MISTAKE, JsonOption, ModelArgument
from aios_compile.cli.output import plain, print_json
from aios_compile.cli.session import model_of
from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError


def doctor(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    expect: Annotated[
        str, typer.Option(help="JSON file of counts; exit code 1 if any of them differs")
    ] = "",
    pin: Annotated[str, typer.Option(help="write the counts for --expect to this file")] = "",
    context: Annotated[int, typer.Option(help="tokens in the cache", min=1)] = 256,
    savings: Annotated[
        bool, typer.Option("--savings", help="count also what each optional pass saves")
    ] = False,
    why: Annotated[
        str,
        typer.Option(
            help="an op, a module path or file.py:LINE: in which kernel, and why not fused"
        ),
    ] = "",
    bandwidth: Annotated[
        float, typer.Option(help="GB/s of memory; measured if not given", min=0, show_default=False)
    ] = 0.0,
) -> None:
    """Examine MODEL (a config.json is enough): fusions, near misses, memory, predicted speed."""
    wanted = _read(expect) if expect else {}
    from aios_compile.study import doctor as study
    from aios_compile.study.bandwidth import read_bandwidth

    parsed = CompileOptions.parse(options)
    speed = 1e9 * bandwidth or read_bandwidth(parsed.threads(), repeats=3)
    subject = model_of(model)
    found = study.examine(subject, parsed, context=context, bandwidth=speed)
    if pin:
        Path(pin).write_text(json.dumps(study.pinned(found), indent=1) + "\n", encoding="utf-8")
    wrong = study.differences(found, wanted)
    saved = study.savings(subject, parsed, context=context) if savings else None
    reasons = study.why(found, why) if why else []
    if as_json:
        shown = {**plain(found), "differences": wrong, "savings": plain(saved), "why": reasons}
        print_json(shown)
    else:
        nothing = f"no op and no module path has {why!r} in it, and no model line file.py:NUMBER"
        print("\n".join(reasons or [nothing]) if why and not found.refused else found)
        print(f"\nwhat each pass saves\n{saved}" if saved else "", end="\n" if saved else "")
        for line in wrong:
            print(f"DIFFERS: {line}")
    if wrong or found.refused:
        raise typer.Exit(EXIT_MISTAKE)


def _read(path: str) -> dict[str, int]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--expect {path}: {error}", advice="write it with --pin FILE") from error
    if not isinstance(value, dict) or not all(isinstance(v, int) for v in value.values()):
        raise ConfigError(f"--expect {path} is not an object of counts")
    return value
