"""What can happen to the scheduler, and the records that a log keeps of it. No behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from aios_compile.sampling_params import MAX_N


@dataclass(frozen=True)
class Arrive:
    """A request that passed admission. Its sequences get consecutive ids from `sequence_id` on.

    all_rows: the logits of every prompt position are wanted. samples False: no token is sampled,
    the sequence ends when its rows are computed. tokens: the prompt's ids; without them the
    request neither hits the prefix cache nor feeds it. tenant: who shares cached pages and a fair
    share. priority: smaller is more urgent (vLLM's order). max_tokens: most output tokens, 0 when
    nobody knows. deadline_us: when an Expire event ends it. num_output_tokens: tokens that an
    engine that is gone has sampled; they follow the prompt's. submitted_us: when the caller handed
    it over, at most a step before the event: the scheduler does not look at it, simulations do.
    """

    request_id: int
    sequence_id: int
    num_prompt_tokens: int
    num_sequences: int = 1
    all_rows: bool = False
    samples: bool = True
    tokens: tuple[int, ...] = ()
    tenant: str = ""
    num_output_tokens: int = 0
    priority: int = 0
    max_tokens: int = 0
    deadline_us: int | None = None
    submitted_us: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Plan the next step. No other plan is in flight.

    drafts: (sequence id, number of draft tokens) that a decode may verify in this step, most
    wanted first. They get what budgets and free pages are left, and never preempt anybody.
    """

    drafts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Commit:
    """The planned step ran. `finished` are (sequence id, reason); the others go on.

    sampled: for each chunk of the plan the tokens that it appends, empty for a chunk that samples
    none; at most one more than its drafts. Left empty: each sampling chunk appends one token whose
    value nobody needs. A sequence that finishes with "error" leaves nothing in the prefix cache.
    """

    finished: tuple[tuple[int, str], ...] = ()
    sampled: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Abort:
    """Drop a request, wherever it is. Never while a step is in flight.

    reason: "abort" (the caller asked) or "disconnect" (the caller is gone).
    """

    request_id: int
    reason: str = "abort"


@dataclass(frozen=True)
class Expire:
    """Drop the requests whose deadline has passed; the plan's `expired` names them."""


@dataclass(frozen=True)
class Preempt:
    """Take a sequence's pages away now, as a shortage would. Nobody sees it in the output.

    how: "recompute", "swap", or "auto", what costs less.
    """

    sequence_id: int
    how: str = "auto"


@dataclass(frozen=True)
class MemoryPressure:
    """Keep `num_pages` pages out of use from now on (0: none), at most what one sequence leaves.

    Cached pages go first, then sequences are preempted. The plan's `withheld` and `returned` are
    the pages whose memory the owner may give to the operating system and must back again.
    """

    num_pages: int


@dataclass(frozen=True)
class Calibrate:
    """New measurements: microseconds to compute a token, and to copy a page to or from the host."""

    token_us: float
    page_copy_us: float


Event = Arrive | Schedule | Commit | Abort | Expire | Preempt | MemoryPressure | Calibrate
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Arrive, Schedule, Commit, Abort, Expire, Preempt, MemoryPressure, Calibrate)
}


def event_record(event: Event, now_us: int) -> dict[str, Any]:
    """Return the event as a JSON-able record; `event_from_record` is the inverse."""
    return {"type": type(event).__name__, "now_us": now_us, **asdict(event)}


def event_from_record(record: dict[str, Any]) -> tuple[Event, int]:
    """Return (event, now_us); raise TypeError, KeyError or ValueError for a damaged record."""
    values = {key: value for key, value in record.items() if key not in ("type", "now_us")}
    for name in ("finished", "drafts", "sampled"):
        if name in values:
            values[name] = tuple(tuple(pair) for pair in values[name])
    if "tokens" in values:
        values["tokens"] = tuple(values["tokens"])
    event: Event = _KINDS[record["type"]](**values)
    for item in fields(event):
        if not _IS[str(item.type)](getattr(event, item.name)):
            raise TypeError(f"{item.name} is not of type {item.type}")
    if isinstance(event, Arrive) and not 1 <= event.num_sequences <= MAX_N:
        raise ValueError(f"num_sequences={event.num_sequences}, expected 1 to {MAX_N}")
    return event, int(record["now_us"])


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _are_whole(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_whole, value))


_IS: dict[str, Callable[[Any], bool]] = {
    "int": _is_whole,
    "int | None": lambda value: value is None or _is_whole(value),
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "tuple[int, ...]": _are_whole,
    "tuple[tuple[int, ...], ...]": lambda value: all(map(_are_whole, value)),
    "tuple[tuple[int, int], ...]": lambda value: all(len(v) == 2 and _are_whole(v) for v in value),
    "tuple[tuple[int, str], ...]": lambda value: all(
        len(v) == 2 and _is_whole(v[0]) and type(v[1]) is str for v in value
    ),
}
