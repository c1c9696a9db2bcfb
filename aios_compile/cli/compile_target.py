"""`aios compile`: the artefact of a model, or its kernels for a machine that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import JsonOption, ModelArgument
from aios_compile.cli.output import folder_bytes, human_bytes, print_json, print_table
from aios_compile.cli.session import load
from aios_compile.errors import ConfigError


def compile_model(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    target: Annotated[
        str,
        typer.Option(
            help="kernels only, for a machine that is not here: cuda:80, cuda:90, cuda:100, "
            "hip:gfx942, or cpu: and an instruction set (cpu:neondot)"
        ),
    ] = "",
    out: Annotated[str, typer.Option("--dump", help="folder for --target's kernels")] = "",
) -> None:
    """Make the artefact of MODEL ahead of time, or with --target its kernels for a machine."""
    if target:
        _kernels(model, target, out, options, as_json)
        return
    if out:
        raise ConfigError("--dump needs --target", advice="`aios dump MODEL OUT` dumps an artefact")
    with load(model, options) as loaded:
        path, summary = Path(loaded.artefact_path), loaded.progress.summary()
    size = folder_bytes(path)
    if as_json:
        print_json({"path": path, "bytes": size, "start": summary})
    else:
        print(f"{path}  {human_bytes(size)}\n{summary}")


def _kernels(model: str, target: str, out: str, options: dict[str, Any], as_json: bool) -> None:
    """Compile for a machine into the folder `out` and print what each kernel uses and costs."""
    if not out:
        raise ConfigError("--target needs a folder", advice=f"--target {target} --dump out/")
    folder = Path(out).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", advice="choose a folder of its own")
    family, _, name = target.partition(":")
    show = _for_cpu if family == "cpu" else _for_card
    show(model, name if family == "cpu" else target, folder, options, as_json)


def _for_cpu(model: str, name: str, folder: Path, options: dict[str, Any], as_json: bool) -> None:
    from aios_compile.study.cpu_compile import compile_for

    report = compile_for(model, name, folder, options)
    if as_json:
        print_json(report.as_dict())
        return
    rows = [
        (row.name, str(row.launches), human_bytes(row.bytes_a_token), human_bytes(size))
        for row, size in report.kernels
    ]
    print_table(("kernel", "launches", "bytes a token", "code"), rows)
    print(f"{report.target}, {report.compiler}: {report.library}")


def _for_card(
    model: str, target: str, folder: Path, options: dict[str, Any], as_json: bool
) -> None:
    from aios_compile.study.gpu_compile import compile_for
    from aios_compile.study.gpu_pages import write_pages

    report = compile_for(model, target, folder, options)
    index = write_pages(report, folder)
    if as_json:
        print_json(
            {
                "index": index,
                "memory": report.memory,
                "ledger": report.ledger,
                "kernels": [k.as_dict() for k in report.kernels],
            }
        )
        return
    rows = [
        (
            k.row.name, str(k.calls), str(k.launches), human_bytes(k.bytes),
            f"{k.predicted_us:.1f}", f"{k.share:.0%}",
            "/".join(str(b.registers) for b in k.decode_binaries()),
            str(sum(b.spill_bytes for b in k.decode_binaries())),
        )
        for k in report.kernels
    ]  # fmt: skip
    head = ("kernel", "calls", "launches", "bytes", "us", "roofline", "registers", "spilled")
    print_table(head, rows)
    print(
        f"{report.target} ({report.card}), decode of one sequence: {report.launches} launches, "
        f"floor {report.floor_us:.0f} us, predicted {report.predicted_us:.0f} us"
    )
    told, *used = report.ledger
    decided = f"; decided {len(used)} variants:" if used else ""
    print("\n  ".join([f"ledger: {told}{decided}", *used]))
    print(f"memory of one {report.card}:\n{report.memory}\n{index}")
