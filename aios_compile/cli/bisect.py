"""`aios bisect`: which pass, kernel or step makes the output of a model wrong."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from aios_compile.cli.options import EXIT_MISTAKE, JsonOption, ModelArgument
from aios_compile.cli.output import print_json
from aios_compile.cli.session import load, model_of
from aios_compile.config import NOT_IN_KEY, CompileOptions
from aios_compile.errors import CaptureError, ConfigError


def bisect(
    model: ModelArgument,
    options: dict[str, Any],
    as_json: JsonOption = False,
    prompt: Annotated[str, typer.Option(help="text whose answer is wrong")] = "",
    tokens: Annotated[int, typer.Option(help="so many random tokens instead", min=1)] = 24,
    against: Annotated[
        str,
        typer.Option(
            help="eager; or another setting that is right: option=value,..., or passes to leave out"
        ),
    ] = "eager",
) -> None:
    """Find the first pass, node and model line where MODEL parts from PyTorch; exit code 1 then."""
    from aios_compile.model_source import open_source
    from aios_compile.study.bisect_settings import changed, parse_setting

    given = CompileOptions.parse(options)
    other = None if against == "eager" else parse_setting(against, given)
    if other is not None and not changed(given, other):
        raise ConfigError(f"--against {against} is the same setting", advice="name another value")
    source = open_source(model_of(model), given)
    if prompt and source.tokenizer is None:
        raise ConfigError("the model has no tokenizer", advice="give --tokens N instead")
    ids = source.tokenizer.encode(prompt) if prompt and source.tokenizer else None
    found = _search(model, given, source, ids or _random_ids(tokens), other)
    if as_json:
        print_json(found)
    else:
        print(found)
    if found.kind:
        raise typer.Exit(EXIT_MISTAKE)


def _search(
    model: str, options: CompileOptions, source: Any, ids: list[int], other: CompileOptions | None
) -> Any:
    """Search passes, then kernels, then the step; with another setting, where the two part."""
    from aios_compile.study import bisect as study

    try:
        subject = study.open_subject(source, options, ids)
    except CaptureError as error:
        return study.find_wrong_capture(error)
    found, module = study.find_wrong_pass(subject, disabled=options.disable_passes, say=_say)
    if other is not None and not found.kind:
        found = _compare_programs(model, options, other, ids)
    found = (
        found
        if found.kind
        else study.find_wrong_kernel(subject, module, say=_say, device=options.device)
    )
    if other is not None and not found.kind:
        found = _compare_answers(model, subject, module, options, other)
    if found.kind:
        return found
    import torch

    with _loaded(model, options, "float32") as loaded:  # as the programs of the passes here
        return study.find_wrong_step(subject, module, torch.as_tensor(loaded(ids)))


def _compare_programs(
    model: str, options: CompileOptions, other: CompileOptions, ids: list[int]
) -> Any:
    from aios_compile.model_source import open_source
    from aios_compile.study.bisect import Finding, open_subject
    from aios_compile.study.bisect_settings import changed, find_difference, text_of

    setting = changed(options, other)
    if all(name in NOT_IN_KEY for name in setting):
        return Finding()  # both are the same program
    one, two = (open_subject(open_source(model_of(model), o), o, ids) for o in (options, other))
    found = find_difference(one, two, options.disable_passes, other.disable_passes, say=_say)
    is_whole = found.kind == "setting"
    return dataclasses.replace(found, name=text_of(setting)) if is_whole else found


def _compare_answers(
    model: str, subject: Any, module: Any, options: CompileOptions, other: CompileOptions
) -> Any:
    from aios_compile.study.bisect_settings import changed, find_different_answer

    setting = changed(options, other)
    as_given = "kv_cache_dtype" in setting or all(name in NOT_IN_KEY for name in setting)
    return find_different_answer(
        subject,
        module,
        options,
        other,
        lambda chosen: _loaded(model, chosen, "" if as_given else "float32"),
    )


def _loaded(model: str, options: CompileOptions, kv_cache_dtype: str) -> Any:
    """Load a model; kv_cache_dtype: instead of the options', "" for theirs."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    if kv_cache_dtype:
        given["kv_cache_dtype"] = kv_cache_dtype
    return load(model, {**given, "progress": False})


def _random_ids(count: int) -> list[int]:
    """Return ids that every vocabulary has."""
    return [(i * 7919) % 61 + 1 for i in range(count)]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
