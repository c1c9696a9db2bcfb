"""Find where two settings of one model begin to differ: the first pass, else what runs the kernels.

Both programs run on the model's weights and one prompt.

What a setting should leave alone is known: options that are no part of the artefact's key (threads,
prefix cache, scheduling, speculation) change no bit; any other may round differently, which is
measured on the other program itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aios_compile.config import NOT_IN_KEY, CompileOptions
from aios_compile.errors import ConfigError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE, STAGES
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.study.bisect import (
    Finding,
    Say,
    Subject,
    logits_of,
    oracle_of,
    relative_error,
    steps,
    with_node,
)

NUM_GENERATED = 32  # tokens after the prompt, where the settings must not change a bit
Load = Callable[[CompileOptions], Any]


def parse_setting(text: str, options: CompileOptions) -> CompileOptions:
    """Return `options` with another setting: "num_threads=1,dtype=float32", or names of optional
    passes that are left out. Raises ConfigError for what is neither.
    """
    optional = [info_of(p).name for p in PIPELINE if not info_of(p).required]
    changes: dict[str, Any] = {}
    left_out = list(options.disable_passes)
    for item in re.split(r",(?![^{]*\})", text):
        name, equals, value = item.strip().partition("=")
        if equals:
            changes[name.replace("-", "_")] = _value(value)
        elif name in optional:
            left_out.append(name)
        else:
            raise ConfigError(
                f"no optional pass {name!r}, and no option=value",
                advice=f"the passes are {', '.join(optional)}",
            )
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return CompileOptions.parse({**given, "disable_passes": tuple(left_out), **changes})


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def changed(options: CompileOptions, other: CompileOptions) -> dict[str, Any]:
    """Return the other's value of each option that differs."""
    names = [f.name for f in dataclasses.fields(options)]
    return {n: getattr(other, n) for n in names if getattr(options, n) != getattr(other, n)}


def text_of(setting: dict[str, Any]) -> str:
    return ", ".join(f"{n}={v}" for n, v in setting.items())


def find_difference(
    subject: Subject,
    other: Subject,
    disabled: Sequence[str] = (),
    other_disabled: Sequence[str] = (),
    stages: Sequence[Stage] = STAGES,
    say: Say = lambda text: None,
) -> Finding:
    """Return the first pass after which `subject` computes other logits than the other setting's
    last program; kind "setting" if it does so before any pass (another dtype of the weights).
    """
    reference = snapshot.take(other.captured)
    run_pipeline(reference, STAGES, other.options, disabled=_known(other_disabled), verify=0)
    oracle, budget = oracle_of(other, reference)
    module = snapshot.take(subject.captured)

    def error_now(name: str) -> float:
        error = relative_error(logits_of(subject, module, torch.float32), oracle)
        say(f"{name}: {error:.1e} from the other setting")
        return error

    error = error_now("captured")
    if error > budget:
        detail = "the programs differ before any pass: both may be right"
        return Finding("setting", detail=detail, error=error, budget=budget)
    for function, _, saved in steps(subject, module, stages, disabled):
        name = info_of(function).name
        error = error_now(name)
        if error > budget:
            found = Finding(
                "pass", name, file=f"passes/{name}.py", error=error, budget=budget,
                detail="logits differ from those of the other setting",
            )  # fmt: skip
            return with_node(found, subject, saved, module)
    return Finding()


def _known(names: Sequence[str]) -> list[str]:
    return [n for n in names if n in {info_of(p).name for p in PIPELINE}]


def find_different_answer(
    subject: Subject,
    module: IRModule,
    options: CompileOptions,
    other: CompileOptions,
    load: Load,
) -> Finding:
    """Compare the compiled models of two settings: logits of the prompt and, where the settings may
    change no bit, the tokens after it. module: level 3, whose rounding is the measure.
    """
    setting = changed(options, other)
    exact = all(name in NOT_IN_KEY for name in setting)
    answers = [_answer(load(o), subject.prompt, exact) for o in (options, other)]
    _, budget = (None, 0.0) if exact else oracle_of(subject, module, native=True)
    (logits, tokens), (other_logits, other_tokens) = answers
    error = relative_error(logits, other_logits.double())
    name = text_of(setting)
    if error > budget:
        where = "logits of the prompt"
    elif tokens != other_tokens:
        at = next(i for i, (a, b) in enumerate(zip(tokens, other_tokens)) if a != b)
        where = f"token {at} after the prompt: {tokens[at]}, with {name} {other_tokens[at]}"
    else:
        return Finding()
    return Finding(
        "setting", name, file="runtime/, codegen/cpp/step.py", error=error, budget=budget,
        detail=f"{where}; passes and kernels are right alone",
    )  # fmt: skip


def _answer(model: Any, prompt: Sequence[int], exact: bool) -> tuple[Tensor, list[int]]:
    with model as loaded:
        logits = torch.as_tensor(loaded(list(prompt)))
        if not exact:
            return logits, []
        room = loaded.program.settings["max_model_len"] - len(prompt)
        count = min(NUM_GENERATED, room)
        result = loaded.generate(list(prompt), max_tokens=count, temperature=0, ignore_eos=True)
        return logits, list(result.outputs[0].token_ids)
