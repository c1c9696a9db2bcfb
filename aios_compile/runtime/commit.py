"""What the result of a step means for its requests: tokens, log-probabilities, text, the end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from aios_compile.runtime.batch import Batch, Limits, StepResult
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.outputs import Logprob, TokenLogprobs
from aios_compile.runtime.request import Request, Sequence
from aios_compile.runtime.schedule_state import Chunk, Plan, SequenceState


class Outcome(NamedTuple):
    """What a step did: (sequence id, reason) of those that ended; the tokens of each chunk."""

    finished: list[tuple[int, str]]
    sampled: list[tuple[int, ...]]
    touched: list[Request]  # to be delivered


class Committer:
    """Applies step results to sequences. num_sampled counts the tokens that it appended."""

    def __init__(self, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self.num_sampled = 0

    def apply(
        self,
        plan: Plan,
        batch: Batch,
        result: StepResult,
        sequences: Mapping[int, Sequence],
        requests: Mapping[int, Request],
        states: Mapping[int, SequenceState],
        drafts: Mapping[int, Seq[int]],
    ) -> Outcome:
        """Append what was sampled and end what has ended.

        A row whose logits were not finite ends its whole request with "error", and no other one;
        rows behind a draft that did not come true count for nothing.
        """
        ended: list[tuple[int, str]] = []
        touched: dict[int, Request] = {}
        tokens: list[tuple[int, ...]] = []
        finite, sampled = result.finite.tolist(), result.sampled_ids.tolist()
        all_finite = 0 not in finite
        row = 0
        for chunk in plan.chunks:
            state, sequence = states[chunk.sequence_id], sequences[chunk.sequence_id]
            request = requests[state.request_id]
            if all_finite and _is_next_token(chunk, state) and self._append(sequence, sampled[row]):
                tokens.append((sampled[row],))
                touched[state.request_id] = request
                row += 1
                continue
            end = chunk.start + chunk.num_tokens - chunk.num_drafts
            samples = state.samples and end == state.num_tokens
            rows = range(row, row + chunk.num_rows - chunk.num_drafts)
            row += chunk.num_rows
            tokens.append(())
            if sequence.finish_reason is not None:
                continue  # a sibling's row of this step failed the whole request
            if not (all_finite or sequence.admitted.wants_logits or all(finite[r] for r in rows)):
                ended += _fail(request)
                touched[state.request_id] = request
                continue
            if len(rows) > samples:
                first = max(chunk.start, state.num_rows_done)
                self._prompt_rows(request, first, rows[: len(rows) - samples], batch, result)
            if samples:
                ahead = drafts[chunk.sequence_id][: chunk.num_drafts] if chunk.num_drafts else ()
                tokens[-1], whole = self._verify(sequence, ahead, rows[-1], sampled, finite, result)
                touched[state.request_id] = request
                if not whole:
                    ended += _fail(request)
                    continue
            elif not state.samples and end == state.num_prompt_tokens:
                sequence.finish_reason = "length"
                touched[state.request_id] = request
            if sequence.finish_reason is not None:
                ended.append((chunk.sequence_id, sequence.finish_reason))
                request.num_unfinished -= 1
        return Outcome(ended, tokens, list(touched.values()))

    def _append(self, sequence: Sequence, token_id: int) -> bool:
        """Append a token to a sequence that goes on whatever it is; False: nothing was done.

        What `_token` does in the case of nearly every token of a busy engine, in a quarter of the
        time.
        """
        tokens = sequence.tokens
        count = len(tokens) + 1
        if (
            not sequence.is_plain
            or token_id in sequence.end_ids
            or count >= sequence.most_tokens
            or count >= self._limits.max_model_len
            or sequence.finish_reason is not None
        ):
            return False
        tokens.append(token_id)
        if sequence.text is not None:
            sequence.text.append(token_id, True)
        self.num_sampled += 1
        return True

    def _prompt_rows(
        self, request: Request, first: int, rows: range, batch: Batch, result: StepResult
    ) -> None:
        if request.logits is not None:
            request.logits[first : first + len(rows)] = result.logits[rows.start : rows.stop]
        elif request.prompt_logprobs is not None:
            count = request.admitted.params.prompt_logprobs or 0
            for row in rows:
                entry = self._logprobs(int(batch.given_ids[row]), row, count, result)
                request.prompt_logprobs.append(entry)

    def _verify(
        self,
        sequence: Sequence,
        ahead: Seq[int],
        row: int,
        sampled: list[int],
        finite: list[int],
        result: StepResult,
    ) -> tuple[tuple[int, ...], bool]:
        """Append the token of `row`, and of each row after it as long as the drafts come true.

        Returns them, and False if the next one would come from logits that are not finite.
        """
        for place in range(len(ahead) + 1):
            if not finite[row + place]:
                return tuple(sampled[row : row + place]), False
            self._token(sequence, sampled[row + place], row + place, result)
            if sequence.finish_reason is not None:
                break
            if place == len(ahead) or sampled[row + place] != ahead[place]:
                break
        return tuple(sampled[row : row + place + 1]), True

    def _token(self, sequence: Sequence, token_id: int, row: int, result: StepResult) -> None:
        """Append one sampled token and decide whether the sequence ends with it."""
        entry = None
        if sequence.logprobs is not None:
            count = sequence.admitted.params.logprobs or 0
            entry = self._logprobs(token_id, row, count, result)
        sequence.append(token_id, entry)
        self.num_sampled += 1
        self._decide(sequence, token_id)
        if sequence.finish_reason is not None:
            finish_text(sequence)

    def _decide(self, sequence: Sequence, token_id: int) -> None:
        admitted = sequence.admitted
        count = sequence.num_output_tokens
        if count > admitted.params.min_tokens:
            if token_id in admitted.eos_token_ids:
                sequence.finish_reason = "stop"
                return
            if token_id in admitted.stop_token_ids:
                sequence.finish_reason, sequence.stop_reason = "stop", token_id
                return
        stop = sequence.append_text(token_id)
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop
            return
        if count >= admitted.max_tokens or len(sequence.tokens) >= self._limits.max_model_len:
            sequence.finish_reason = "length"

    def _logprobs(self, token_id: int, row: int, count: int, result: StepResult) -> TokenLogprobs:
        """Return the token's own entry, then the `count` best ones."""
        logprob, rank = float(result.logprobs[row]), int(result.ranks[row])
        entries = {token_id: Logprob(logprob, rank, self._decode(token_id))}
        if count:
            ids, values = result.top_ids[row, :count].tolist(), result.top_logprobs[row].tolist()
            for place, (top, value) in enumerate(zip(ids, values), start=1):
                if top not in entries:
                    entries[top] = Logprob(value, place, self._decode(top))
        return entries

    def _decode(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _is_next_token(chunk: Chunk, state: SequenceState) -> bool:
    """Return whether a chunk is the last token alone, and its row is the one that is sampled."""
    return (
        chunk[2] == 1 == chunk[3] and state.samples and chunk[1] + 1 == state.num_tokens
    )  # as Chunk's fields, in half the time


def finish_text(sequence: Sequence) -> None:
    """Release the text that was held back; a stop token shows only if the caller asked for it."""
    if sequence.text is None:
        return
    on_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
    shown = on_token and sequence.admitted.params.include_stop_str_in_output
    sequence.text.finish(sequence.tokens[-1] if shown else None)


def end_request(
    request: Request, reason: str, stop_reason: str | None = None
) -> list[tuple[int, str]]:
    """End all unfinished sequences of a request; return their ids with the reason."""
    ended = []
    for sequence in request.sequences:
        if sequence.finish_reason is None:
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason
            finish_text(sequence)
            ended.append((sequence.sequence_id, reason))
    request.num_unfinished = 0
    return ended


def _fail(request: Request) -> list[tuple[int, str]]:
    return end_request(request, "error")
