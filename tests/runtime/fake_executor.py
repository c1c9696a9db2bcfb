"""A model without weights, for tests of the runtime: the logits are a hash of the tokens before.

`FakeExecutor` keeps (token id, position) of every token in a pool of pages and reads each sequence
back through its page table, so a foreign, stale or missing page changes the hash, and an assert on
the positions tells which. `logits_after` is the same model without pages, batches or chunks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.runtime.batch import Batch, Limits, StepResult

POISON = -777


def limits(**changes: Any) -> Limits:
    """Return small limits; the tests' prompts cross pages and chunks."""
    values: dict[str, Any] = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "max_num_logit_rows": 8,
        "max_pages_per_sequence": 16,
        "num_pages": 65,
        "page_size": 4,
        "max_model_len": 64,
        "vocab_size": 50,
    }
    return Limits(**{**values, **changes})


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniform(z: NDArray[np.uint64]) -> NDArray[np.float64]:
    return ((_mix(z) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def logits_after(
    tokens: Iterable[int], vocab_size: int, window: int | None = None
) -> NDArray[np.float32]:
    """Return float32 [V]: the model. Depends on every token (in the window) and its place."""
    values = np.array(list(tokens), np.uint64)
    places = np.arange(1, len(values) + 1, dtype=np.uint64)
    if window is not None:
        values, places = values[-window:], places[-window:]
    with np.errstate(over="ignore"):
        state = np.sum(_mix(values * np.uint64(0x9E3779B97F4A7C15) + places), dtype=np.uint64)
        ids = np.arange(vocab_size, dtype=np.uint64)
        return (6 * _uniform(state + ids * np.uint64(0xD6E8FEB86659FD93))).astype(np.float32)


def sample_row(
    logits: NDArray[np.float32], batch: Batch, row: int
) -> tuple[int, float, int, NDArray[np.int64], NDArray[np.float32]]:
    """Return (id, logprob, rank, top ids, top logprobs) in the order of the contract's rules."""
    raw = logits.astype(np.float64)
    logprobs = raw - raw.max() - np.log(np.sum(np.exp(raw - raw.max())))
    token = int(batch.given_ids[row])
    if not batch.has_given[row]:
        token = _choose(_processed(raw.copy(), batch, row), batch, row)
    order = np.argsort(-logprobs, kind="stable")
    rank = int(np.sum(logprobs > logprobs[token])) + 1
    top = order[:20].astype(np.int64)
    return token, float(logprobs[token]), rank, top, logprobs[top].astype(np.float32)


def _processed(x: NDArray[np.float64], batch: Batch, row: int) -> NDArray[np.float64]:
    def part(starts: NDArray[np.int64], values: NDArray[Any]) -> NDArray[Any]:
        return values[starts[row] : starts[row + 1]]

    allowed = part(batch.allowed_starts, batch.allowed_ids)
    if len(allowed):
        kept = np.full_like(x, -np.inf)
        kept[allowed] = x[allowed]
        x = kept
    bias = part(batch.bias_starts, batch.bias_values)
    np.add.at(x, part(batch.bias_starts, batch.bias_ids), bias)
    ids = part(batch.penalty_starts, batch.penalty_ids)
    counts = part(batch.penalty_starts, batch.penalty_counts)
    assert len(set(ids.tolist())) == len(ids), "penalty ids must be unique in a row"
    repetition = float(batch.repetition_penalty[row])
    x[ids] = np.where(x[ids] > 0, x[ids] / repetition, x[ids] * repetition)
    x[ids] -= batch.frequency_penalty[row] * counts
    x[ids] -= batch.presence_penalty[row] * (counts > 0)
    return x


def _choose(x: NDArray[np.float64], batch: Batch, row: int) -> int:
    temperature = float(batch.temperature[row])
    if temperature == 0:
        return int(np.argmax(x))
    x = x / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    x = np.where(p < batch.min_p[row] * p.max(), -np.inf, x)
    if batch.top_k[row]:
        x = np.where(x < np.sort(x)[::-1][: batch.top_k[row]][-1], -np.inf, x)
    order = np.argsort(-x, kind="stable")
    p = np.exp(x[order] - x.max())
    before = np.cumsum(p / p.sum()) - p / p.sum()
    x[order[before >= batch.top_p[row]]] = -np.inf
    ids = np.arange(len(x), dtype=np.uint64)
    seed = np.array(batch.seeds[row]).view(np.uint64)
    position = np.uint64(batch.sample_positions[row])
    with np.errstate(over="ignore"):
        key = _mix(seed + position * np.uint64(0x9E3779B97F4A7C15))
        u = _uniform(key + ids * np.uint64(0xBF58476D1CE4E5B9))
    return int(np.argmax(x - np.log(-np.log(u))))


class FakeExecutor:
    """Executor of the fake model. `free_pages` (set by tests) names pages to poison each step.

    Steps that are begun run at random moments that a device could choose, as late as at their end.
    """

    overlap = "always"

    def __init__(self, limits: Limits, window: int | None = None) -> None:
        self.limits = limits
        self.window = window
        self.usable = True
        slots = limits.num_pages * limits.page_size
        self.tokens = np.full(slots, POISON, np.int64)
        self.positions = np.full(slots, POISON, np.int64)
        self.host: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self.free_pages: Callable[[], Iterable[int]] = lambda: ()
        self.before_step: Callable[[Batch], None] = lambda batch: None
        self.after_logits: Callable[[Batch, NDArray[np.float32]], None] = lambda b, x: None
        self.on_read: Callable[[int, NDArray[np.int64]], None] = lambda s, slots: None
        self.num_steps = 0
        self.num_closed = 0
        self.begun: list[FakeStep] = []  # that have not ended
        self.random = random.Random(0)
        self.last_ids = np.zeros(0, np.int64)
        self.step_seconds = 0.0
        self.max_rows = 0

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.settle()
        pages = self.tokens.reshape(-1, self.limits.page_size)
        positions = self.positions.reshape(-1, self.limits.page_size)
        for source, target in pairs:
            assert source != 0 and target != 0, "the trash page was copied"
            pages[target], positions[target] = pages[source], positions[source]

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.settle()
        size = self.limits.page_size
        for page, host_page in pairs:
            assert page != 0 and host_page != 0, "the trash page was swapped"
            here = slice(page * size, (page + 1) * size)
            self.host[host_page] = (self.tokens[here].copy(), self.positions[here].copy())

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.settle()
        size = self.limits.page_size
        for host_page, page in pairs:
            here = slice(page * size, (page + 1) * size)
            self.tokens[here], self.positions[here] = self.host.pop(host_page)

    def close(self) -> None:
        self.num_closed += 1

    def poison(self, pages: Iterable[int]) -> None:
        for page in [0, *pages]:
            here = slice(page * self.limits.page_size, (page + 1) * self.limits.page_size)
            self.tokens[here] = self.positions[here] = POISON

    def begin(
        self,
        batch: Batch,
        sources: NDArray[np.int64] | None = None,
        hold: NDArray[np.int32] | None = None,
    ) -> FakeStep:
        self.begun.append(FakeStep(self, batch, sources, hold))
        assert len(self.begun) <= 2, "three steps at once"
        if self.random.random() < 0.3:
            self.begun[0].take_turn()
        return self.begun[-1]

    def settle(self) -> None:
        while self.begun:
            self.begun[0].end()

    def step(self, batch: Batch) -> StepResult:
        self.settle()
        return self._step(batch)

    def _step(self, batch: Batch) -> StepResult:
        self.num_steps += 1
        self.poison(self.free_pages())
        self.before_step(batch)
        time.sleep(self.step_seconds)
        self._check_sizes(batch)
        self.tokens[batch.slots] = batch.token_ids
        self.positions[batch.slots] = batch.positions
        logits = self._logits(batch)
        self.after_logits(batch, logits)
        result = self._sample(batch, logits)
        self.last_ids = result.sampled_ids
        return result

    def _check_sizes(self, batch: Batch) -> None:
        most, real = self.limits, int(batch.query_starts[-1])
        assert 0 < real <= most.max_num_batched_tokens
        assert batch.num_tokens == most.padded_tokens(real)
        assert batch.num_sequences <= most.max_num_seqs
        assert batch.num_rows <= most.max_num_logit_rows
        self.max_rows = max(self.max_rows, batch.num_rows)
        assert np.all(batch.slots[:real] >= most.page_size), "a real token in the trash page"
        padding = batch.slots[real:]
        assert np.all((padding >= 0) & (padding < most.page_size)), "padding outside page 0"
        assert len(set(batch.slots[:real].tolist())) == real, "two tokens in one slot"
        assert np.all(batch.logit_rows < real)
        for s in range(batch.num_sequences):
            own = batch.positions[batch.query_starts[s] : batch.query_starts[s + 1]]
            assert own[-1] == batch.context_lengths[s] - 1 and np.all(np.diff(own) == 1)
        for name in ("penalty", "bias", "allowed"):
            starts, ids = getattr(batch, f"{name}_starts"), getattr(batch, f"{name}_ids")
            assert len(starts) == batch.num_rows + 1 and starts[0] == 0, name
            assert starts[-1] == len(ids) and np.all(np.diff(starts) >= 0), name
            for first, last in pairwise(starts):
                assert len(set(ids[first:last].tolist())) == last - first, f"{name} ids repeat"
        for value in vars(batch).values():
            assert value.flags.c_contiguous and value.dtype in (np.int64, np.float32)

    def _prefix(self, batch: Batch, s: int, end: int) -> NDArray[np.int64]:
        """Read [0, end) of a sequence back, or what its window shows of it; the canary."""
        places = np.arange(0 if self.window is None else max(0, end - self.window), end)
        pages = batch.page_tables[s][places // self.limits.page_size]
        slots = pages * self.limits.page_size + places % self.limits.page_size
        assert np.array_equal(self.positions[slots], places), (
            f"sequence {s} reads a foreign, freed or missing page: {self.positions[slots]}"
        )
        self.on_read(s, slots)
        return np.concatenate([np.zeros(places[0], np.int64), self.tokens[slots]])

    def _logits(self, batch: Batch) -> NDArray[np.float32]:
        logits = np.zeros((batch.num_rows, self.limits.vocab_size), np.float32)
        for row, token in enumerate(batch.logit_rows.tolist()):
            s = int(np.searchsorted(batch.query_starts, token, side="right")) - 1
            prefix = self._prefix(batch, s, int(batch.positions[token]) + 1)
            logits[row] = logits_after(prefix, self.limits.vocab_size, self.window)
        return logits

    def _sample(self, batch: Batch, logits: NDArray[np.float32]) -> StepResult:
        rows = batch.num_rows
        result = StepResult(
            np.zeros(rows, np.int64),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.int64),
            np.zeros((rows, 20), np.int64),
            np.zeros((rows, 20), np.float32),
            np.isfinite(logits).all(axis=1).astype(np.int64),
            logits,
        )
        for row in range(rows):
            if result.finite[row]:
                token, logprob, rank, top_ids, top = sample_row(logits[row], batch, row)
                result.sampled_ids[row], result.logprobs[row] = token, logprob
                result.ranks[row] = rank
                result.top_ids[row, : len(top_ids)], result.top_logprobs[row, : len(top)] = (
                    top_ids,
                    top,
                )
        return result


class FakeStep:
    """A step that was begun: its turn comes when the one before has ended, or somewhat later."""

    def __init__(self, executor: FakeExecutor, batch: Batch, sources: Any, hold: Any) -> None:
        self._executor, self._batch, self._sources, self._hold = executor, batch, sources, hold
        self._had_turn = self._has_ended = self._is_left_out = False
        self._result: StepResult | None = None
        self._error: Exception | None = None
        self.micros = 1.0

    def take_turn(self) -> None:
        if self._had_turn or self._is_left_out:
            return
        self._had_turn = True
        self._is_left_out = self._hold is not None and bool(self._hold[0])
        if self._executor.random.random() < 0.5:
            self._run()

    def _run(self) -> None:
        if self._is_left_out or self._result is not None or self._error is not None:
            return
        if self._sources is not None:
            taken = self._sources >= 0
            ids = self._executor.last_ids[self._sources[taken]]
            self._batch.token_ids[taken] = ids
        try:
            self._result = self._executor._step(self._batch)
        except Exception as error:  # noqa: BLE001 - for whoever waits
            self._error = error

    def leave_out(self) -> bool:
        if not self._had_turn:
            self._is_left_out = True
        return self._is_left_out

    def make_sure(self) -> bool:
        self._hold = None
        return not self._is_left_out

    def end(self) -> None:
        if self._has_ended:
            return
        before = self._executor.begun
        while before[0] is not self:
            before[0].end()
        if not self._is_left_out:
            self.take_turn()
            self._run()
        before.pop(0)
        self._has_ended = True
        if before and self._executor.random.random() < 0.8:
            before[0].take_turn()

    def wait(self) -> StepResult | None:
        self.end()
        if self._error is not None:
            raise self._error
        return self._result


class FakeTokenizer:
    """Byte pieces: id i is PIECES[i]; some ids are half a character. Ids past the end are "<i>"."""

    PIECES = [bytes([c]) for c in b" abcdefghijklmnopqrstuvwxyz.,"]
    PIECES += [b"the", b"an", b"and ", "é".encode()[:1], "é".encode()[1:], b"ab", b"bc"]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        data, ids = text.encode(), []
        while data:
            best = max(
                (i for i, piece in enumerate(self.PIECES) if data.startswith(piece)),
                key=lambda i: len(self.PIECES[i]),
            )
            ids.append(best)
            data = data[len(self.PIECES[best]) :]
        return ids

    def raw(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.PIECES[i] if i < len(self.PIECES) else f"<{i}>".encode() for i in ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.raw(ids).decode("utf-8", errors="replace")

    def stream(self) -> FakeTokenStream:
        return FakeTokenStream(self)


class FakeTokenStream:
    """Streaming half of FakeTokenizer, by the standard library's incremental decoder."""

    def __init__(self, tokenizer: FakeTokenizer) -> None:
        import codecs

        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        return self._decoder.decode(self._tokenizer.raw([index]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def greedy(
    prompt: Sequence[int], count: int, vocab_size: int = 50, window: int | None = None
) -> list[int]:
    """Return what the model says after a prompt, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits_after(tokens, vocab_size, window))))
    return tokens[len(prompt) :]
