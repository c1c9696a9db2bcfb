"""How long a step takes, as a small additive model fitted to the steps of a decision log.

step_us = tokens(T) + row * R + key * K + context * C + page * P + arrival * A + prompt * Q
          + woken * W + changed * B + changed_row * B * R

T tokens computed, R logit rows, P pages copied or swapped, A requests with Q prompt tokens that
arrived while it ran; W is 1 for a step of an engine that slept before it: its threads wake up, and
other programs have had the caches. B is 1 for a batch that is not the step before moved on by a
token: it is built anew, and was not begun ahead of its turn, which costs something for each row: a
decode after a change takes twice as long as the next one. Attention reads K keys, once for all
queries of a chunk, and multiplies C pairs of a query and a key that it sees: a prompt's tokens
share what a decode reads for itself, so that a pair of a decode costs several times one of a
prompt. tokens(T) rises from knot to knot in straight lines: kernels work in tiles of 4 and 16
tokens, a few tokens are bound by bytes and many by arithmetic, so one slope for all lengths is off
by a third somewhere.

The log has the time of every event, so nothing else is measured: a step lasts from its Schedule to
the next one, or to its Commit when nothing was left to do. What follows the Commit (text, metrics,
the log) is a time of its own, after + after_row * R: tokens are there before it, and of a short
step it is a fifth, of a long prompt nothing. How far single steps are off is kept as
quantiles, from which a simulation draws: for steps of each length their own, as a short decode is
further off, for its time, than a long prompt. Steps far off (another process had the core) are
stalls, which come at random as often as they came: percentiles of a machine with neighbours need
both.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.errors import LogError
from aios_compile.runtime.events import Arrive, Commit, Schedule
from aios_compile.runtime.replay import follow, read_records
from aios_compile.runtime.schedule_state import Plan, SchedulerState

VERSION = 7
LEAST_STEPS = 20
NUM_TRIMS = 3  # rounds in which steps far off (another process had the core) are left out
TRIM_AT = 4.0  # times the median deviation
KNOTS = (1, 2, 4, 5, 8, 9, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KNOT_RISES = np.diff((0, *KNOTS)).astype(np.float64)  # times how far each is climbed: the tokens
LAST_TILE = KNOTS.index(17)  # past it a slope without steps is the one before
PRIOR = 8.0  # how many steps that counts as
QUANTILES = 41
NOISE_STEP = 4.0  # times as long: steps of a class of their own
NOISE_STEPS = 12  # of a class, at least
LISTS = ("tokens_us", "noise_from_us", "stalls_us")
SLOPES = (
    *("row_us", "key_us", "context_us", "page_us", "arrival_us", "prompt_us"),
    *("woken_us", "changed_us", "changed_row_us"),
)
MOST_AFTER = 0.9  # of a step's time


@dataclass(frozen=True)
class CostModel:
    """Microseconds. Written as JSON: {"version": 7, "tokens_us": [...], ...}.

    tokens_us: what a step of KNOTS[i] tokens takes more than one of KNOTS[i - 1], without its rows
    and attention. after_us, after_row_us: of a step's time what passes when its tokens are there.
    wake_us: from a request's submission to the step of an engine that slept. noise[i]: quantiles of
    the time of a step over its expectation, where that is noise_from_us[i] or more.
    stalls_a_second: how many steps were far off, and stalls_us: quantiles of how far.
    """

    tokens_us: tuple[float, ...]
    row_us: float = 0.0
    key_us: float = 0.0
    context_us: float = 0.0
    page_us: float = 0.0
    arrival_us: float = 0.0
    prompt_us: float = 0.0
    woken_us: float = 0.0
    changed_us: float = 0.0
    changed_row_us: float = 0.0
    after_us: float = 0.0
    after_row_us: float = 0.0
    wake_us: float = 0.0
    noise_from_us: tuple[float, ...] = (0.0,)
    noise: tuple[tuple[float, ...], ...] = ((1.0,),)
    stalls_us: tuple[float, ...] = (0.0,)
    stalls_a_second: float = 0.0
    num_steps: int = 0  # that it was fitted to
    median_error: float = 0.0  # of one step, as a share of its time

    def __post_init__(self) -> None:
        assert len(self.tokens_us) == len(KNOTS), f"{len(KNOTS)} knots"
        assert 0 < len(self.noise) == len(self.noise_from_us) and all(self.noise), "noise"

    def __call__(self, plan: Plan, woken: bool = False, changed: bool = False) -> float:
        """Return the microseconds that a plan's step takes, without arrivals."""
        return float(np.dot(features(plan, woken=woken, changed=changed), self.coefficients))

    def drawn(
        self, plan: Plan, rng: random.Random, woken: bool, changed: bool = False
    ) -> tuple[float, float]:
        """Return until when its tokens are there, and the whole, with noise and maybe a stall."""
        expected = self(plan, woken, changed)
        noise = rng.choice(self.noise[max(0, bisect_right(self.noise_from_us, expected) - 1)])
        after = min(self.after_us + self.after_row_us * plan.num_rows, MOST_AFTER * expected)
        micros = expected * noise
        if rng.random() * 1e6 < self.stalls_a_second * micros:
            micros += rng.choice(self.stalls_us)
        return micros - after * noise, micros

    def arrival(self, num_prompt_tokens: int) -> float:
        """Return what taking in a request costs the engine's thread."""
        return self.arrival_us + num_prompt_tokens * self.prompt_us

    @property
    def coefficients(self) -> NDArray[np.float64]:
        return np.array([*self.tokens_us, *(getattr(self, n) for n in SLOPES)], np.float64)

    def step_us(self, num_tokens: int) -> float:
        """Return tokens(T)."""
        return float(np.dot(_rises(num_tokens), self.tokens_us))

    def __str__(self) -> str:
        steps = ", ".join(f"{count}: {self.step_us(count):.3g}" for count in (1, 4, 16, 64, 256))
        slopes = ", ".join(f"{name} {getattr(self, name):.3g}" for name in SLOPES)
        return (
            f"a step of tokens: {steps} us; {slopes}; {self.stalls_a_second:.2g} stalls a second; "
            f"fitted to {self.num_steps} steps, median error {self.median_error:.0%}"
        )

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
            lists: dict[str, Any] = {name: tuple(map(float, values.pop(name))) for name in LISTS}
            num_steps = int(values.pop("num_steps"))
            noise = tuple(tuple(map(float, each)) for each in values.pop("noise"))
            numbers: dict[str, Any] = {name: float(value) for name, value in values.items()}
            return cls(num_steps=num_steps, noise=noise, **lists, **numbers)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise LogError(f"{path}: not a cost model: {error!r}") from error


def features(
    plan: Plan,
    num_arrived: int = 0,
    num_prompt_tokens: int = 0,
    woken: bool = False,
    changed: bool = False,
) -> tuple[float, ...]:
    """Return how far each rise between knots is climbed, then R, K, C, P, A, Q, W, B, BR."""
    keys = sum(c.start + c.num_tokens for c in plan.chunks)
    pairs = sum(c.num_tokens * (c.start + (c.num_tokens + 1) / 2) for c in plan.chunks)
    pages = len(plan.copies) + len(plan.swap_outs) + len(plan.swap_ins)
    attention = keys, pairs
    return (
        *_rises(plan.num_tokens),
        plan.num_rows,
        *attention,
        pages,
        num_arrived,
        num_prompt_tokens,
        float(woken),
        float(changed),
        float(changed * plan.num_rows),
    )


def is_changed(plan: Plan, before: Plan | None) -> bool:
    """Return whether a batch is not the step before it moved on by a token.

    before: None when the engine slept; what waking costs includes the batch.
    """
    if before is None:
        return False
    if plan.num_prefill_tokens or before.num_prefill_tokens:
        return True
    return [c.sequence_id for c in plan.chunks] != [c.sequence_id for c in before.chunks]


def _rises(num_tokens: int) -> tuple[float, ...]:
    """Return for each knot how much of the way from the one before is done, 0 to 1."""
    found = [1.0]
    for before, knot in pairwise(KNOTS):
        found.append(min(1.0, max(0.0, (num_tokens - before) / (knot - before))))
    found[-1] = max(0.0, (num_tokens - KNOTS[-2]) / (KNOTS[-1] - KNOTS[-2]))  # goes on for ever
    return tuple(found)


@dataclass
class LoggedSteps:
    """What a log says of its steps: features and times; how long arrivals woke the engine.

    began_us: of each step, by the log's clock. afters: (when, R, us) without arrivals. wakes:
    (when, us).
    """

    rows: list[tuple[float, ...]] = field(default_factory=list)
    times_us: list[float] = field(default_factory=list)
    began_us: list[int] = field(default_factory=list)
    afters: list[tuple[int, int, int]] = field(default_factory=list)
    wakes: list[tuple[int, int]] = field(default_factory=list)

    def within(self, spans: Sequence[tuple[int, int]]) -> LoggedSteps:
        """Return what began in one of the spans [from, to) of the log's clock."""

        def has(micros: int) -> bool:
            return any(begin <= micros < end for begin, end in spans)

        kept = [i for i, began in enumerate(self.began_us) if has(began)]
        return LoggedSteps(
            [self.rows[i] for i in kept],
            [self.times_us[i] for i in kept],
            [self.began_us[i] for i in kept],
            [after for after in self.afters if has(after[0])],
            [wake for wake in self.wakes if has(wake[0])],
        )


def read_steps(path: Path) -> LoggedSteps:
    """Read the steps of a decision log; raise LogError for a damaged one."""
    limits, options, events = read_records(path)
    state, found = SchedulerState.empty(limits, options, b"fit"), LoggedSteps()
    step: tuple[Plan, int, Plan | None] | None = None  # that has not ended; and the one before
    committed_us, arrived = 0, (0, 0)
    submitted_us: int | None = None  # by the request that woke the engine

    def end(now_us: int) -> None:
        assert step is not None
        plan, start_us, before = step
        found.rows.append(features(plan, *arrived, before is None, is_changed(plan, before)))
        found.times_us.append(now_us - start_us)
        found.began_us.append(start_us)
        if not arrived[0] and now_us > committed_us:
            found.afters.append((committed_us, plan.num_rows, now_us - committed_us))

    for logged in events:
        event, now_us = logged.event, logged.now_us
        if isinstance(event, Schedule):
            if step is not None:
                end(now_us)
            elif submitted_us is not None:
                found.wakes.append((now_us, now_us - submitted_us))
            submitted_us, arrived = None, (0, 0)
        elif isinstance(event, Arrive):
            if step is not None:
                arrived = arrived[0] + 1, arrived[1] + event.num_prompt_tokens
            elif submitted_us is None:
                submitted_us = event.submitted_us
        plan = follow(path, state, logged)
        if isinstance(event, Schedule):
            step = plan, now_us, None if step is None else step[0]
        elif isinstance(event, Commit):
            committed_us = now_us
            if not state.has_work and step is not None:
                end(now_us)
                step = None
    return found


def fit_log(path: Path) -> CostModel:
    """Fit the model to a decision log; raise LogError for a damaged or a short one."""
    return fit_logs([path])


def fit_logs(paths: Sequence[Path]) -> CostModel:
    """Do the same with several logs of one engine."""
    return fit_steps([read_steps(path) for path in paths], ", ".join(map(str, paths)))


def fit_steps(steps: Sequence[LoggedSteps], where: str) -> CostModel:
    """Fit the model to steps of one engine; raise LogError, which says `where`, if they are few."""
    times = [time for each in steps for time in each.times_us]
    if len(times) < LEAST_STEPS:
        raise LogError(f"{where}: {len(times)} steps, expected at least {LEAST_STEPS} to fit")
    after_us, after_row_us = _line([after[1:] for each in steps for after in each.afters])
    wakes = [wake for each in steps for _, wake in each.wakes]
    return fit(
        [row for each in steps for row in each.rows],
        times,
        after_us=after_us,
        after_row_us=after_row_us,
        wake_us=float(np.median(wakes)) if wakes else 0.0,
    )


def fit(
    rows: Sequence[Sequence[float]],
    times: Sequence[float],
    after_us: float = 0.0,
    after_row_us: float = 0.0,
    wake_us: float = 0.0,
) -> CostModel:
    """Least squares of the relative error, without negative costs and without far-off steps."""
    x, y = np.array(rows, np.float64), np.maximum(np.array(times, np.float64), 1.0)
    kept = np.ones(len(y), bool)
    prior = _prior(x.shape[1], float(np.median(y / np.maximum(x[:, : len(KNOTS)] @ KNOT_RISES, 1))))
    for left in range(NUM_TRIMS, -1, -1):
        wanted = np.concatenate([np.ones(int(kept.sum())), np.zeros(len(prior))])
        found = _non_negative(np.concatenate([x[kept] / y[kept, None], prior]), wanted)
        errors = np.abs(x @ found / y - 1)
        if left:
            kept = errors <= TRIM_AT * max(float(np.median(errors)), 1e-3)
    expected = x @ found
    error = float(np.median(np.abs(expected / y - 1)))
    scale = float(y[kept].sum()) / max(float(expected[kept].sum()), 1e-9)
    found, expected = found * scale, expected * scale
    noise_from_us, noise = _noise(y[kept], expected[kept])
    late = y[~kept] - expected[~kept]
    late = late[late > 0]
    return CostModel(
        tokens_us=tuple(found[: len(KNOTS)].tolist()),
        **dict(zip(SLOPES, found[len(KNOTS) :].tolist())),
        after_us=after_us,
        after_row_us=after_row_us,
        wake_us=wake_us,
        noise_from_us=noise_from_us,
        noise=noise,
        stalls_us=tuple(_quantiles(late).tolist()) if len(late) else (0.0,),
        stalls_a_second=1e6 * len(late) / float(y.sum()),
        num_steps=len(y),
        median_error=error,
    )


def _noise(
    times: NDArray[np.float64], expected: NDArray[np.float64]
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Return from which expectation on each class of steps is, and quantiles of its ratios."""
    order = np.argsort(expected, kind="stable")
    longer = expected[order] / max(float(expected[order[0]]), 1e-9)
    borders = np.searchsorted(longer, NOISE_STEP ** np.arange(1, 8))
    classes: list[NDArray[np.intp]] = []
    for part in np.split(order, borders):
        if classes and min(len(part), len(classes[-1])) < NOISE_STEPS:
            classes[-1] = np.concatenate([classes[-1], part])
        else:
            classes.append(part)
    ratios = [times[c] / np.maximum(expected[c], 1e-9) for c in classes]
    begins = [0.0, *(float(expected[c[0]]) for c in classes[1:])]
    return tuple(begins), tuple(tuple(_quantiles(each).tolist()) for each in ratios)


def _line(pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return (a, b) of y = a + b * x, neither negative, without what is far above the median."""
    if not pairs:
        return 0.0, 0.0
    x, y = np.array(pairs, np.float64).T
    kept = y <= TRIM_AT * np.median(y)
    found = _non_negative(np.stack([np.ones(int(kept.sum())), x[kept]], 1), y[kept])
    return float(found[0]), float(found[1])


def _prior(width: int, token_us: float) -> NDArray[np.float64]:
    """Return rows that are zero when each slope past the tiles is the slope before it.

    Each counts as relative error of a step of that many tokens, at token_us a token.
    """
    rows = np.zeros((len(KNOTS) - LAST_TILE - 1, width))
    for row, place in zip(rows, range(LAST_TILE + 1, len(KNOTS))):
        begin = 0 if place == LAST_TILE + 1 else place - 2
        run = KNOTS[place] - KNOTS[place - 1]
        row[place] = 1.0
        row[begin + 1 : place] = -run / (KNOTS[place - 1] - KNOTS[begin])
        row *= PRIOR / (token_us * KNOTS[place])
    return rows


def _quantiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values of equal weight that stand for all; with few values, those."""
    if len(values) <= QUANTILES:
        return np.sort(values)
    return np.asarray(np.quantile(values, (np.arange(QUANTILES) + 0.5) / QUANTILES))


def _non_negative(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares; a column whose coefficient would be negative is left out, worst first."""
    columns = [i for i in range(x.shape[1]) if x[:, i].any()]
    found = np.zeros(x.shape[1])
    scale = np.maximum(np.abs(x).max(axis=0), 1e-30)
    while columns:
        part = np.linalg.lstsq(x[:, columns] / scale[columns], y, rcond=None)[0]
        if part.min() >= 0:
            found[columns] = part / scale[columns]
            break
        columns.pop(int(np.argmin(part)))
    return found
