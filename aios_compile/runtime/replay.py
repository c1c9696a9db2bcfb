"""Replay of a decision log: the same scheduler code makes every decision again.

A log is JSON lines: {"header": ...} with its version, the limits and the options, then every
{"event": ...} followed by the {"decision": ...}s that it led to. It carries no clock but the
events' own and no token ids but pseudonyms, and it is all that the scheduler needs. A log may end
in the midst of an event or of a line, where its writer was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aios_compile.errors import LogError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.events import Event, event_from_record
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance

VERSION = 1
MAX_LINE_BYTES = 64 << 20


def header_record(limits: Limits, options: SchedulerOptions) -> dict[str, Any]:
    """Return the first line of a log."""
    return {"version": VERSION, "limits": asdict(limits), "options": asdict(options)}


@dataclass(frozen=True)
class Difference:
    """The first place where a replay went another way. None: that side had no decision there."""

    line: int
    logged: Decision | None
    replayed: Decision | None


@dataclass(frozen=True)
class ReplayResult:
    """What a replay found; `difference` is None if every decision was made again.

    is_cut: the last event lacks decisions that it must have led to.
    """

    num_events: int
    num_decisions: int
    kinds: dict[str, int]
    difference: Difference | None
    is_cut: bool = False


@dataclass(frozen=True)
class LoggedEvent:
    """One event of a log with the decisions that were made on it. line: where it stands."""

    line: int
    event: Event
    now_us: int
    decisions: list[Decision]


def read_records(path: Path) -> tuple[Limits, SchedulerOptions, Iterator[LoggedEvent]]:
    """Return what the header says and an iterator over the events; raise LogError."""
    lines = _lines(path)
    first = next(lines, (0, {}))[1].get("header")
    if not isinstance(first, dict):
        raise LogError(f"{path}: no header in the first line: not a decision log")
    if first.get("version") != VERSION:
        raise LogError(f"{path}: version {first.get('version')!r}, expected {VERSION}")
    try:
        values = dict(first["limits"])
        values["token_buckets"] = tuple(values["token_buckets"])
        limits, options = Limits(**values), SchedulerOptions(**first["options"])
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise LogError(f"{path}: the header is damaged: {error!r}") from error
    return limits, options, _events(path, lines)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while text := file.readline(MAX_LINE_BYTES):
                number += 1
                try:
                    record = json.loads(text)
                except ValueError as error:
                    if number > 1 and text[-1] != "\n" and len(text) < MAX_LINE_BYTES:
                        return  # the end of the file: its writer was killed as it wrote this
                    raise LogError(f"{path}:{number}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise LogError(f"{path}:{number}: got {type(record).__name__}, not an object")
                yield number, record
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from error


def _events(path: Path, lines: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[LoggedEvent]:
    current: LoggedEvent | None = None
    for number, record in lines:
        try:
            if "event" in record:
                if current is not None:
                    yield current
                current = LoggedEvent(number, *event_from_record(record["event"]), [])
            elif current is not None:
                values = {f.name: record["decision"][f.name] for f in fields(Decision)}
                values["sequences"] = tuple(values["sequences"])
                current.decisions.append(Decision(**values))
            else:
                raise LogError(f"{path}:{number}: a decision before the first event")
        except (KeyError, TypeError, ValueError) as error:
            raise LogError(f"{path}:{number}: the record is damaged: {error!r}") from error
    if current is not None:
        yield current


def follow(path: Path, state: SchedulerState, logged: LoggedEvent) -> Plan:
    """Advance a state by an event of a log; raise LogError for one that cannot come now."""
    try:
        return advance(state, logged.event, logged.now_us)
    except (AssertionError, LookupError) as error:
        text = f"{path}:{logged.line}: the scheduler cannot follow this event: {error!r}"
        raise LogError(text, advice="is the log cut, or of another version?") from error


def replay_log(path: Path) -> ReplayResult:
    """Replay a log and compare every decision; stops at the first difference."""
    limits, options, events = read_records(path)
    state = SchedulerState.empty(limits, options, b"replay")
    num_events, kinds = 0, dict[str, int]()
    for logged in events:
        num_events += 1
        plan = follow(path, state, logged)
        for i in range(max(len(plan.decisions), len(logged.decisions))):
            mine, theirs = _at(plan, i), logged.decisions[i : i + 1]
            if not theirs and next(events, None) is None:
                return ReplayResult(num_events, sum(kinds.values()), kinds, None, is_cut=True)
            if [mine] != theirs:
                difference = Difference(logged.line + 1 + i, theirs[0] if theirs else None, mine)
                return ReplayResult(num_events, sum(kinds.values()), kinds, difference)
            assert mine is not None
            kinds[mine.kind] = kinds.get(mine.kind, 0) + 1
    return ReplayResult(num_events, sum(kinds.values()), kinds, None)


def _at(plan: Plan, index: int) -> Decision | None:
    return plan.decisions[index] if index < len(plan.decisions) else None
