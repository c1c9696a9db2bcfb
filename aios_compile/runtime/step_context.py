"""One event being handled: the state that it changes and the plan that it fills."""

from __future__ import annotations

from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.schedule_state import Plan, SchedulerState, SequenceState


class StepContext:
    """What the scheduler's parts share while they handle one event."""

    __slots__ = ("now_us", "plan", "state")

    def __init__(self, state: SchedulerState, now_us: int) -> None:
        self.state = state
        self.now_us = now_us
        self.plan = Plan()

    def log(self, kind: str, sequences: tuple[int, ...], reason: str, **detail: int) -> None:
        """Add a decision to the plan."""
        step = self.state.step
        self.plan.decisions.append(Decision(step, self.now_us, kind, sequences, reason, detail))

    def log_wait(self, sequence: SequenceState, reason: str, **detail: int) -> None:
        """Log why the head of the queue waits, once for each reason."""
        if self.state.last_wait != (sequence.sequence_id, reason):
            self.state.last_wait = (sequence.sequence_id, reason)
            self.log("wait", (sequence.sequence_id,), reason, **detail)
