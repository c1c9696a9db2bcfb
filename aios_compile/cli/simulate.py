"""`aios replay` and `aios simulate`: the scheduler without a model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aios_compile.cli.options import JsonOption
from aios_compile.cli.output import print_json, print_table
from aios_compile.errors import ConfigError, LogError

if TYPE_CHECKING:
    from aios_compile.study.simulator import Simulation

KINDS = ("poisson", "bursts", "trace")


def replay(
    log: Annotated[str, typer.Argument(metavar="LOG", help="file of the option decision_log")],
    as_json: JsonOption = False,
) -> None:
    """Make every decision of LOG again with the same scheduler code; exit code 1 if one differs."""
    from aios_compile.runtime.replay import replay_log

    result = replay_log(Path(log))
    if as_json:
        print_json(result)
    else:
        print_table(("decision", "times"), [(k, str(n)) for k, n in sorted(result.kinds.items())])
        print(f"{result.num_events} events, {result.num_decisions} decisions made again")
        if result.is_cut:
            print("the log ends in the midst of the last event: its writer was killed")
    if result.difference is not None:
        found = result.difference
        raise LogError(
            f"{log}:{found.line}: the decisions differ: logged {found.logged}, "
            f"replayed {found.replayed}",
            advice="the scheduler has changed since the log was written",
        )


def simulate(
    log: Annotated[
        str,
        typer.Argument(metavar="LOG", help="a decision log: limits, options, and the steps' times"),
    ],
    arrivals: Annotated[
        str, typer.Option(help="poisson, bursts, or trace: the log's own arrivals")
    ] = "trace",
    rate: Annotated[float, typer.Option(help="requests a second")] = 10.0,
    num_requests: Annotated[int, typer.Option(help="how many")] = 200,
    prompt_tokens: Annotated[int, typer.Option(help="mean of a prompt's own tokens")] = 64,
    output_tokens: Annotated[int, typer.Option(help="mean of the tokens generated")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="tokens that a tenant's prompts share")] = 0,
    tenants: Annotated[int, typer.Option(help="number of tenants")] = 1,
    seed: Annotated[int, typer.Option(help="of the synthetic arrivals")] = 0,
    cost: Annotated[str, typer.Option(help="cost model to use, default: fitted to LOG")] = "",
    save_cost: Annotated[str, typer.Option(help="file for the fitted cost model")] = "",
    plot: Annotated[str, typer.Option(help="SVG file of what ran and waited")] = "",
    scheduling_policy: Annotated[str, typer.Option(help="instead of the log's")] = "",
    chunked_prefill_size: Annotated[int, typer.Option(help="instead of the log's")] = 0,
    max_num_batched_tokens: Annotated[int, typer.Option(help="instead of the log's")] = 0,
    max_num_seqs: Annotated[int, typer.Option(help="instead of the log's")] = 0,
    num_pages: Annotated[int, typer.Option(help="instead of the log's")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Play arrivals against the real scheduler and a cost model fitted to LOG's steps."""
    from aios_compile.config import SCHEDULING_POLICIES
    from aios_compile.study.cost_model import CostModel, fit_log
    from aios_compile.study.simulator import recorded, simulate, synthetic
    from aios_compile.study.timeline_picture import write_timeline

    if arrivals not in KINDS:
        raise ConfigError(f"arrivals={arrivals!r} is out of range, expected {', '.join(KINDS)}")
    if scheduling_policy and scheduling_policy not in SCHEDULING_POLICIES:
        known = ", ".join(SCHEDULING_POLICIES)
        raise ConfigError(f"scheduling_policy={scheduling_policy!r}: expected {known}")
    if not 0 < rate < math.inf:
        raise ConfigError(f"rate={rate} is out of range, expected more than 0")
    for name, value, least in (
        ("num_requests", num_requests, 1),
        ("tenants", tenants, 1),
        ("prompt_tokens", prompt_tokens, 0),
        ("output_tokens", output_tokens, 0),
        ("shared_tokens", shared_tokens, 0),
        ("chunked_prefill_size", chunked_prefill_size, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} is out of range, expected {least} or more")
    limits, options, trace, really = recorded(Path(log))
    limits = _changed(
        limits,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_num_logit_rows=max_num_seqs and max(max_num_seqs, limits.max_num_logit_rows),
        num_pages=num_pages,
    )
    options = _changed(options, policy=scheduling_policy, chunked_prefill_size=chunked_prefill_size)
    model = CostModel.load(Path(cost)) if cost else fit_log(Path(log))
    if save_cost:
        model.save(Path(save_cost))
    if arrivals != "trace":
        trace = synthetic(
            arrivals, num_requests, rate=rate, prompt_tokens=prompt_tokens,
            output_tokens=output_tokens, shared_tokens=shared_tokens, num_tenants=tenants,
            most_tokens=min(limits.capacity_tokens, limits.max_model_len), seed=seed,
        )  # fmt: skip
    result = simulate(trace, limits, options, model)
    if plot:
        write_timeline(result.timeline, Path(plot))
    _show(result, really if arrivals == "trace" else None, model, as_json)


def _changed(value: Any, **changes: Any) -> Any:
    """Return the dataclass with the changes that were asked for (not 0 or empty)."""
    try:
        return dataclasses.replace(value, **{name: new for name, new in changes.items() if new})
    except AssertionError as error:
        raise ConfigError(str(error)) from None


def _show(result: Simulation, really: Simulation | None, model: Any, as_json: bool) -> None:
    summary = result.summary()
    measured = None if really is None else really.summary()
    if as_json:
        print_json({"simulated": summary, "measured": measured, "cost": model})
        return
    columns = ("", "simulated") if measured is None else ("", "simulated", "in the log")
    rows = []
    for name, value in summary.items():
        row = [name, f"{value:.4g}"]
        rows.append(row if measured is None else [*row, f"{measured[name]:.4g}"])
    print_table(columns, rows)
    print(model)
