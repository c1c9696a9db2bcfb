"""`aios quantize`: write a 4- or 8-bit checkpoint, its errors compensated on a calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aios_compile.cli.options import JsonOption
from aios_compile.cli.output import print_json, print_table
from aios_compile.errors import ConfigError
from aios_compile.progress import Progress


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder or hub id")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write; must not exist")],
    calibrate: Annotated[str, typer.Option(help="UTF-8 text file, of the kind to be read")] = "",
    method: Annotated[str, typer.Option(help="gptq or awq")] = "gptq",
    bits: Annotated[int, typer.Option(help="4 or 8")] = 4,
    group: Annotated[int, typer.Option(help="weights a scale: 32, 64 or 128")] = 32,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    samples: Annotated[int, typer.Option(help="windows of the text to calibrate on")] = 128,
    context: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="never ask the hub")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantise MODEL with GPTQ or AWQ into the folder OUT (compressed-tensors, pack-quantized)."""
    text = _text(calibrate)
    for name, value in (("samples", samples), ("context", context)):
        if value < 1:
            raise ConfigError(f"{name}={value} is out of range, expected at least 1")
    from aios_compile.checkpoint import hub
    from aios_compile.quantize.quantize_checkpoint import quantize_checkpoint
    from aios_compile.quantize.scheme import Scheme

    report = quantize_checkpoint(
        hub.resolve(model, local_files_only),
        Path(out),
        text,
        method=method,
        scheme=Scheme(bits, group, not asymmetric),
        samples=samples,
        context=context,
        progress=Progress(show=not as_json),
    )
    if as_json:
        print_json(report)
        return
    worst = sorted(report.matrices, key=lambda row: -row.error)[:5]
    if not report.cached:
        rows = [(r.name, f"{r.error:.2%}", f"{r.error_to_nearest:.2%}") for r in worst]
        print_table(("most is lost in", "error", "rounded to nearest"), rows)
    for name, reason in report.kept:
        print(f"kept: {name}: {reason}")
    again = " is there already, of the same model, text and options" if report.cached else ""
    print(
        f"{out}{again}: {len(report.matrices)} matrices by {report.method} on "
        f"{report.tokens:,} tokens, "
        f"{report.bits:.2f} bits a weight, lm_head included"
    )


def _text(path: str) -> str:
    if not path:
        raise ConfigError(
            "no calibration text", advice="--calibrate FILE, text of the kind that it will read"
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"calibrate={path!r}: {reason}", advice="give a text file") from None
