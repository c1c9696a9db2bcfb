"""`aios bench`: what steps take on this machine, and the cost model that `aios simulate` plays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from aios_compile.cli.options import JsonOption, ModelArgument
from aios_compile.cli.output import plain, print_json, print_table
from aios_compile.cli.session import load
from aios_compile.errors import ConfigError


def bench(
    model: ModelArgument,
    options: dict[str, Any],
    rounds: Annotated[int, typer.Option(help="times of the sweep", min=1)] = 3,
    save_cost: Annotated[
        str, typer.Option(help="file for the cost model, for `aios simulate --cost`")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Sweep decodes of 1, 2, ... sequences and prompts of all lengths on MODEL's engine."""
    from aios_compile.study.bench import bench as run
    from aios_compile.study.cost_model import fit_log

    with tempfile.TemporaryDirectory() as folder:
        log = options.setdefault("decision_log", str(Path(folder) / "log.jsonl"))
        with load(model, options) as loaded:
            if not loaded.program.settings.get("generatable", True):
                raise ConfigError(f"{model} can be called for logits only: there is no decoding")
            found = run(loaded, rounds)
        cost = fit_log(Path(log))
    if save_cost:
        cost.save(Path(save_cost))
    if as_json:
        print_json({**plain(found), "cost": plain(cost)})
        return
    decode = [(row.num_sequences, row.step_us, row.tokens_a_second) for row in found.decode]
    prefill = [(row.num_tokens, row.ttft_us, row.tokens_a_second) for row in found.prefill]
    print_table(("decoding", "us a step", "tokens/s"), [_texts(row) for row in decode])
    print_table(("prompt", "us to the first token", "tokens/s"), [_texts(row) for row in prefill])
    print(cost)


def _texts(row: tuple[float, ...]) -> list[str]:
    return [f"{value:.0f}" for value in row]
