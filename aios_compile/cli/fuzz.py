"""`aios fuzz`: random programs through the compiler, held against eager PyTorch and float64."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import EXIT_MISTAKE, JsonOption
from aios_compile.cli.output import print_json, print_table
from aios_compile.errors import ConfigError

TARGETS = ("cpp", "triton")


def fuzz(
    as_json: JsonOption = False,
    seconds: Annotated[float, typer.Option(help="stop after so many seconds", min=0)] = 60.0,
    examples: Annotated[int, typer.Option(help="stop after so many examples", min=1)] = 10**9,
    seed: Annotated[int, typer.Option(help="the examples are a function of it", min=0)] = 0,
    first: Annotated[int, typer.Option(help="number of the first example", min=0)] = 0,
    op: Annotated[str, typer.Option(help="graphs with one of these operators (a,b)")] = "",
    passes: Annotated[
        str, typer.Option("--pass", help="plant what these passes look for (a,b)")
    ] = "",
    target: Annotated[str, typer.Option(help="cpp, or triton in its interpreter")] = "cpp",
    out: Annotated[str, typer.Option(help="folder for scripts of failures")] = "fuzz-failures",
) -> None:
    """Compile random programs and compare them with eager; exit code 1 when one is wrong.

    A failure is shrunk to a script on disk that shows it. The error may be 4 times eager's own.
    """
    if target not in TARGETS:
        raise ConfigError(f"no target {target!r}", advice=f"there are {', '.join(TARGETS)}")
    from aios_compile.study.fuzz.names import check_names

    chosen_passes, chosen_ops = _names(passes), _names(op)
    check_names(chosen_passes, chosen_ops)
    if target == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    from aios_compile.study.fuzz.campaign import run_campaign

    with tempfile.TemporaryDirectory(prefix="aios-fuzz-") as objects:
        tally = run_campaign(
            itertools.islice(itertools.count(first), examples),
            seed=seed,
            objects=Path(objects),
            scripts=Path(out),
            passes=chosen_passes,
            ops=chosen_ops,
            target=target,
            seconds=seconds,
            say=lambda text: print(text, file=sys.stderr),
        )
    if as_json:
        print_json(tally)
    else:
        _show(tally)
    if tally.failures:
        raise typer.Exit(EXIT_MISTAKE)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _show(tally: Any) -> None:
    found = tally.as_dict()
    print_table(("pass", "examples"), [(n, str(c)) for n, c in found["fired"].items()])
    print(f"{tally.examples} examples in {tally.seconds:.0f} s, {len(tally.failures)} failures")
    print(f"largest error: {tally.worst:.0%} of what is allowed")
    for reason, count in found["refused"].items():
        print(f"refused {count}: {reason}")
    for failure in tally.failures:
        print(f"example {failure.number} of seed {failure.seed}: {failure.message}")
        print(f"  {failure.script}")
