"""When requests began, gave tokens and ended, as metrics. Used by the engine's thread alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from aios_compile.errors import error_code
from aios_compile.runtime.health import now_us
from aios_compile.runtime.metrics import EngineMetrics
from aios_compile.runtime.request import Request


class RequestMeter:
    """Writer of `metrics`; the watchdog's own requests are counted apart, and nobody reads them."""

    def __init__(self) -> None:
        self.metrics = EngineMetrics()
        self._probes = EngineMetrics()

    def arrived(self, request: Request) -> None:
        self._of(request).num_prompt_tokens += len(request.admitted.prompt_token_ids)

    def began(self, request: Request) -> bool:
        """Note the first step of a request; a recompute after a preemption is none."""
        if request.started_us is not None:
            return False
        request.started_us = now_us()
        waited_us = request.started_us - request.submitted_us
        self._of(request).queue_s.observe(waited_us / 1e6)
        return True

    def stepped(self, touched: Iterable[Request], num_sampled: int) -> None:
        """Note the requests that a step gave something; num_sampled tokens were given so far."""
        at_us = now_us()
        gaps: Counter[int] = Counter()
        for request in touched:
            if request.first_token_us is None:
                request.first_token_us = at_us
                if not request.admitted.wants_logits:
                    first_us = at_us - request.submitted_us
                    self._of(request).ttft_s.observe(first_us / 1e6)
            else:
                gaps[request.last_token_us] += 1
            request.last_token_us = at_us
        self.metrics.num_output_tokens = num_sampled
        for last_us, times in gaps.items():  # most have the same one: of the step before
            self.metrics.inter_token_s.observe((at_us - last_us) / 1e6, times)

    def ended(self, request: Request, error: Exception | None) -> None:
        """Note its end, with an error or with what its first sequence ended with."""
        request.finished_us = now_us()
        metrics = self._of(request)
        reason = request.sequences[0].finish_reason or "error"
        if error is not None or reason == "error":
            metrics.errors["not_finite" if error is None else error_code(error)] += 1
        metrics.on_end(request.finished_us, request.finished_us - request.submitted_us, reason)

    def retry_after_s(self, num_waiting: int) -> int:
        return self.metrics.retry_after_s(num_waiting, now_us())

    def _of(self, request: Request) -> EngineMetrics:
        return self._probes if request.is_probe else self.metrics
