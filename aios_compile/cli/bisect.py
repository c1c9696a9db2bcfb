"""`aios bisect`: which pass, kernel or step makes the output of a model wrong."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from aios_compile.cli.options import EXIT_MISTAKE, JsonOption, ModelArgument
from aios_compile.cli.output import print_json
from aios_compile.cli.session import load
from aios_compile.config import CompileOptions
from aios_compile.errors import CaptureError, ConfigError


def bisect(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    prompt: Annotated[str, typer.Option(help="text whose answer is wrong")] = "",
    tokens: Annotated[int, typer.Option(help="so many random tokens instead", min=1)] = 24,
    against: Annotated[
        str, typer.Option(help="eager, or passes (a,b) to leave out in a second search")
    ] = "eager",
) -> None:
    """Find the first pass, node and model line where MODEL parts from PyTorch; exit code 1 then."""
    from aios_compile.model_source import open_source
    from aios_compile.passes.graph_pass import info_of
    from aios_compile.passes.pipeline import PIPELINE
    from aios_compile.study import bisect as study

    given = CompileOptions.parse(options)
    left_out = () if against == "eager" else tuple(against.split(","))
    known = [info_of(p).name for p in PIPELINE if not info_of(p).required]
    for name in left_out:
        if name not in known:
            raise ConfigError(f"no optional pass {name!r}", advice=f"there are {', '.join(known)}")
    source = open_source(model, given)
    if prompt and source.tokenizer is None:
        raise ConfigError("the model has no tokenizer", advice="give --tokens N instead")
    ids = source.tokenizer.encode(prompt) if prompt and source.tokenizer else None
    found = _search(study, model, given, source, ids or _random_ids(tokens), left_out)
    if as_json:
        print_json(found)
    else:
        print(found)
    if found.kind:
        raise typer.Exit(EXIT_MISTAKE)


def _search(
    study: Any,
    model: str,
    options: CompileOptions,
    source: Any,
    ids: list[int],
    left_out: tuple[str, ...],
) -> Any:
    try:
        subject = study.open_subject(source, options, ids)
    except CaptureError as error:
        return study.find_wrong_capture(error)
    found, module = study.find_wrong_pass(subject, disabled=options.disable_passes, say=_say)
    if left_out and not found.kind:
        disabled = (*options.disable_passes, *left_out)
        found, _ = study.find_wrong_pass(subject, disabled=disabled, say=_say)
    found = found if found.kind else study.find_wrong_kernel(subject, module, say=_say)
    if found.kind:
        return found
    import torch

    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    with load(model, {**given, "kv_cache_dtype": "float32", "progress": False}) as loaded:
        return study.find_wrong_step(subject, torch.as_tensor(loaded(ids)))


def _random_ids(count: int) -> list[int]:
    """Return ids that every vocabulary has."""
    return [(i * 7919) % 61 + 1 for i in range(count)]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
