"""How long a step takes, as a small linear model fitted to the steps of a decision log.

step_us = step + token * T + row * R + context * C + page * P

T tokens computed, R logit rows, C pairs of a query and a key that it sees (what attention does),
P pages copied or swapped. The log has the time of every event, so nothing else is measured: a step
lasts from its Schedule to the next one, or to its Commit when nothing was left to do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aios_compile.errors import LogError
from aios_compile.runtime.events import Commit, Schedule
from aios_compile.runtime.replay import read_records
from aios_compile.runtime.schedule_state import Plan, SchedulerState
from aios_compile.runtime.scheduler import advance

VERSION = 1
LEAST_STEPS = 20
NUM_TRIMS = 3  # rounds in which steps far off (another process had the core) are left out
TRIM_AT = 4.0  # times the median deviation


COSTS = ("step_us", "token_us", "row_us", "context_us", "page_us")


@dataclass(frozen=True)
class CostModel:
    """Microseconds. Written as JSON: {"version": 1, "step_us": ..., ...}."""

    step_us: float
    token_us: float
    row_us: float
    context_us: float
    page_us: float
    num_steps: int = 0  # that it was fitted to
    median_error: float = 0.0  # of one step, as a share of its time

    def __call__(self, plan: Plan) -> float:
        """Return the microseconds that a plan's step takes."""
        return float(np.dot(features(plan), self.coefficients))

    @property
    def coefficients(self) -> NDArray[np.float64]:
        return np.array([getattr(self, name) for name in COSTS], np.float64)

    def save(self, path: Path) -> None:
        """Write the model to a file."""
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read a model; raise LogError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("version")
            if version != VERSION:
                raise LogError(f"{path}: version {version!r}, expected {VERSION}")
            costs = {name: float(values[name]) for name in (*COSTS, "median_error")}
            return cls(num_steps=int(values["num_steps"]), **costs)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LogError(f"{path}: not a cost model: {error!r}") from error


def features(plan: Plan) -> tuple[float, ...]:
    """Return 1, T, R, C, P of a plan."""
    pairs = sum(c.num_tokens * (c.start + (c.num_tokens + 1) / 2) for c in plan.chunks)
    pages = len(plan.copies) + len(plan.swap_outs) + len(plan.swap_ins)
    return (1.0, plan.num_tokens, plan.num_rows, pairs, pages)


def fit_log(path: Path) -> CostModel:
    """Fit the model to a decision log; raise LogError for a damaged or a short one."""
    limits, options, events = read_records(path)
    state = SchedulerState.empty(limits, options, b"fit")
    rows: list[tuple[float, ...]] = []
    times: list[float] = []
    start_us: int | None = None
    for logged in events:
        if isinstance(logged.event, Schedule) and start_us is not None:
            times.append(logged.now_us - start_us)
            start_us = None
        plan = advance(state, logged.event, logged.now_us)
        if isinstance(logged.event, Schedule):
            rows.append(features(plan))
            start_us = logged.now_us
        elif isinstance(logged.event, Commit) and not state.has_work and start_us is not None:
            times.append(logged.now_us - start_us)
            start_us = None
    if len(times) < LEAST_STEPS:
        raise LogError(f"{path}: {len(times)} steps, expected at least {LEAST_STEPS} to fit")
    return fit(rows[: len(times)], times)


def fit(rows: Sequence[Sequence[float]], times: Sequence[float]) -> CostModel:
    """Least squares of the relative error, without negative costs and without far-off steps."""
    x, y = np.array(rows, np.float64), np.maximum(np.array(times, np.float64), 1.0)
    kept = np.ones(len(y), bool)
    for _ in range(NUM_TRIMS):
        found = _non_negative(x[kept] / y[kept, None], np.ones(int(kept.sum())))
        errors = np.abs(x @ found / y - 1)
        kept = errors <= TRIM_AT * max(float(np.median(errors)), 1e-3)
    found = _non_negative(x[kept] / y[kept, None], np.ones(int(kept.sum())))
    error = float(np.median(np.abs(x @ found / y - 1)))
    # What was left out took its time all the same: all steps together last as long as measured.
    found *= float(y.sum()) / max(float((x @ found).sum()), 1e-9)
    step, token, row, context, page = (float(value) for value in found)
    return CostModel(step, token, row, context, page, num_steps=len(y), median_error=error)


def _non_negative(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares; a column whose coefficient would be negative is left out, worst first."""
    columns = list(range(x.shape[1]))
    found = np.zeros(x.shape[1])
    scale = np.maximum(np.abs(x).max(axis=0), 1e-30)
    while columns:
        part = np.linalg.lstsq(x[:, columns] / scale[columns], y, rcond=None)[0]
        if part.min() >= 0:
            found[columns] = part / scale[columns]
            break
        columns.pop(int(np.argmin(part)))
    return found
