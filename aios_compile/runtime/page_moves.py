"""Carries out the page copies of a plan, and measures what copies and tokens cost.

The measurements go back to the scheduler as a Calibrate event: it chooses between computing a
preempted sequence again and swapping it out. Used by the engine's thread only.
"""

from __future__ import annotations

import time
from typing import cast

from aios_compile.errors import ConfigError
from aios_compile.runtime.batch import Executor, SwappingExecutor
from aios_compile.runtime.events import Calibrate
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions

STEPS_BETWEEN_EVENTS = 32
LEAST_CHANGE = 0.2  # a new event only for estimates that moved by a fifth


class PageMover:
    """The executor's pages, as plans move them."""

    def __init__(self, executor: Executor, options: SchedulerOptions) -> None:
        if options.num_host_pages and not hasattr(executor, "swap_out"):
            raise ConfigError(
                f"num_host_pages={options.num_host_pages}: {type(executor).__name__} has no host "
                "memory to swap to",
                advice="set it to 0: preempted sequences are computed again",
            )
        self._executor = cast(SwappingExecutor, executor)
        self._has_host = options.num_host_pages > 0

    def move(self, plan: Plan) -> None:
        """Copy pages to the host, then from page to page, then back: the order that plans mean."""
        if plan.swap_outs:
            self._executor.swap_out(plan.swap_outs)
        if plan.copies:
            self._executor.copy_pages(plan.copies)
        if plan.swap_ins:
            self._executor.swap_in(plan.swap_ins)

    def measure_page_copy_us(self) -> float:
        """Return the quickest of a few copies of page 1 to host page 1, before others use them."""
        if not self._has_host:
            return 0.0
        times = []
        for _ in range(4):  # the first one maps the memory
            start = time.perf_counter()
            self._executor.swap_out([(1, 1)])
            times.append((time.perf_counter() - start) * 1e6)
        return min(times)


class TokenCost:
    """What one more token costs in a step: the slope between steps without and with prompts."""

    def __init__(self, page_copy_us: float) -> None:
        self._page_copy_us = page_copy_us
        self._few = [0, 0.0, 0]  # steps, microseconds, tokens of steps of decodes only
        self._many = [0, 0.0, 0]  # the same of steps with prompt tokens
        self._reported_us = 0.0
        self._countdown = STEPS_BETWEEN_EVENTS

    def observe(self, plan: Plan, step_us: float) -> Calibrate | None:
        """Count a step; return an event when the estimate has moved."""
        if not self._page_copy_us:
            return None  # no host memory: there is nothing to choose
        sums = self._many if plan.num_prefill_tokens else self._few
        sums[0] += 1
        sums[1] += step_us
        sums[2] += plan.num_tokens
        self._countdown -= 1
        if self._countdown:
            return None
        self._countdown = STEPS_BETWEEN_EVENTS
        token_us = self.token_us()
        if abs(token_us - self._reported_us) <= LEAST_CHANGE * self._reported_us:
            return None
        self._reported_us = token_us
        return Calibrate(token_us, self._page_copy_us)

    def token_us(self) -> float:
        """Return the slope, or the plain quotient as long as one of the two kinds is missing."""
        (few, few_us, few_tokens), (many, many_us, many_tokens) = self._few, self._many
        if not few or not many or many_tokens / many <= few_tokens / few:
            return (few_us + many_us) / max(1, few_tokens + many_tokens)
        tokens = many_tokens / many - few_tokens / few
        return max(0.0, (many_us / many - few_us / few) / tokens)
