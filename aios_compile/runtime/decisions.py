"""The scheduler's diary: every decision with its reason, as records that go to JSON.

The latest records stay in memory (a ring); a sink file, if any, receives each event and decision as
one JSON line, from which replay.py makes the same decisions again. AIOS_DEBUG=5 prints
the decisions as they are made.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from aios_compile.errors import ConfigError
from aios_compile.runtime.log_privacy import Pseudonyms, without_tokens

KINDS = (
    "arrive", "admit", "wait", "hit", "evict", "decode", "draft", "accept", "chunk", "copy", "fork",
    "window", "preempt", "swap_out", "swap_in", "promote", "pressure", "expire", "finish", "abort",
)  # fmt: skip


ENDS = ("finish", "abort", "expire")


@dataclass(slots=True)
class Decision:
    """One decision. `sequences` are sequence ids; `detail` holds a few numbers by name."""

    step: int
    now_us: int
    kind: str
    sequences: tuple[int, ...]
    reason: str
    detail: dict[str, int]

    def __str__(self) -> str:
        numbers = " ".join(f"{key}={value}" for key, value in self.detail.items())
        names = ",".join(map(str, self.sequences))
        return f"step {self.step}: {self.kind} [{names}] {numbers} ({self.reason})"


class DecisionLog:
    """Keeps the last `capacity` decisions and writes all of them to a sink file if there is one."""

    def __init__(self, capacity: int = 4096, sink: Path | None = None, echo: bool = False) -> None:
        self._echo = echo
        self.ring: deque[Decision] = deque(maxlen=capacity)
        self._file: TextIO | None = None if sink is None else open_sink(sink)
        self._pseudonyms = Pseudonyms()

    def extend(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            self.ring.append(decision)
            if self._echo:
                print(decision, file=sys.stderr)
            if self._file is not None:
                self._write({"decision": asdict(decision)})
                if decision.kind in ENDS:
                    self._pseudonyms.forget(decision.sequences)
        if self._file is not None:
            self._file.flush()  # the last lines of a process that was killed are the ones wanted

    def header(self, record: dict[str, Any]) -> None:
        """Write the first line of the sink: what a replay must know before the first event."""
        if self._file is not None:
            self._write({"header": record})

    def event(self, record: dict[str, Any], sequence_ids: Sequence[int]) -> None:
        """Write one event to the sink, its tokens as pseudonyms; the ring keeps decisions only.

        sequence_ids: of the chunks in flight, when it is a commit.
        """
        if self._file is not None:
            self._write({"event": without_tokens(record, self._pseudonyms, sequence_ids)})

    @property
    def records_events(self) -> bool:
        return self._file is not None

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Flush and close the sink; the ring stays readable."""
        if self._file is not None:
            self._file.close()
            self._file = None


def open_sink(path: Path) -> TextIO:
    """Open a file for one engine's decisions, empty. Raises ConfigError where it cannot be written,
    or where another engine, of this process or another, writes into it.
    """
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"decision_log={str(path)!r}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the file, or its process
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"decision_log={str(path)!r}: another engine writes into it",
            advice="give each engine a file of its own",
        ) from None
    except OSError:
        pass  # a file system without locks
    if path.is_file():  # no pipe, no terminal
        file.truncate(0)
    return file


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[Decision]]:
    """Return the events and the decisions of a sink file."""
    events, decisions = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "event" in record:
            events.append(record["event"])
        elif "decision" in record:
            values = record["decision"]
            decisions.append(Decision(**{**values, "sequences": tuple(values["sequences"])}))
    return events, decisions
