"""`aios ladder`: the same request at every stage of the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import JsonOption, ModelArgument
from aios_compile.cli.output import print_json, print_table
from aios_compile.cli.session import load, model_of
from aios_compile.config import CompileOptions


def ladder(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="tokens after it", min=2)] = 6,
    plot: Annotated[str, typer.Option(help="write a picture (SVG) to this file")] = "",
) -> None:
    """Run one request in eager, captured, pass by pass, compiled, batched and quantised."""
    from aios_compile.model_source import open_source
    from aios_compile.study import ladder as study

    given = CompileOptions.parse(options)
    ids = tuple((i * 7919) % 61 + 1 for i in range(prompt_tokens + tokens))
    request = study.Request(ids, prompt_tokens)
    source = open_source(model_of(model), given)
    rungs = list(study.climb(source, given, lambda chosen: load(model, chosen), request))
    if plot:
        Path(plot).write_text(study.svg(rungs), encoding="utf-8")
    if as_json:
        print_json({"rungs": rungs, "plot": plot})
        return
    print_table(
        ("stage", "tokens/s", "launches", "MB a token", "error"),
        [
            (
                r.name,
                f"{r.tokens_per_second:,.1f}",
                "-" if r.launches is None else str(r.launches),
                "-" if r.bytes_a_token is None else f"{r.bytes_a_token / 1e6:.3f}",
                "-" if r.error is None else f"{r.error:.1e}",
            )
            for r in rungs
        ],
    )
