"""A request from admission to its output. Owner: the engine thread, but for its `Delivery`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from aios_compile.runtime.batch import Floats, Ints
from aios_compile.runtime.delivery import Delivery
from aios_compile.runtime.output_text import OutputText, Tokenizer
from aios_compile.runtime.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    TokenLogprobs,
)
from aios_compile.runtime.penalties import PenaltyCounts
from aios_compile.sampling_params import SamplingParams

_MASK = 2**64 - 1


def mix_seed(seed: int, number: int) -> int:
    """Return a 64-bit seed from two numbers: splitmix64 (Steele, Lea, Flood 2014), twice."""
    for value in (number, 0):
        z = seed = (seed + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        seed = z ^ (z >> 31)
    return seed


def as_int64(bits: int) -> int:
    """Return the int64 with the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


@dataclass(frozen=True)
class Admitted:
    """A request that passed every check, in the form that steps use. Arrays are never written."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # clipped to the model's length; 0: only the logits of the prompt are wanted
    eos_token_ids: frozenset[int]  # empty with ignore_eos
    stop_token_ids: frozenset[int]
    bias_ids: Ints
    bias_values: Floats
    early_bias_ids: Ints  # the bias until min_tokens: stop ids banned too
    early_bias_values: Floats
    allowed_ids: Ints
    bad_words: tuple[tuple[int, ...], ...]

    @property
    def wants_logits(self) -> bool:
        return self.max_tokens == 0

    @property
    def all_rows(self) -> bool:
        return self.wants_logits or self.params.prompt_logprobs is not None


class Sequence:
    """One completion in progress: its tokens and all that follows from them."""

    def __init__(self, admitted: Admitted, index: int, tokenizer: Tokenizer | None) -> None:
        params = admitted.params
        self.admitted = admitted
        self.index = index
        self.sequence_id = -1  # given by the engine, as is the seed
        self.seed = 0
        self.tokens = list(admitted.prompt_token_ids)  # the prompt, then the output
        self.num_prompt_tokens = len(self.tokens)
        self.text: OutputText | None = None
        if tokenizer is not None and not admitted.wants_logits:
            self.text = OutputText(tokenizer, params.stop, params.include_stop_str_in_output)
        self.penalties = PenaltyCounts(self.tokens, params) if params.has_penalties else None
        self.has_changing_bias = params.min_tokens > 0 or bool(admitted.bad_words)
        # a token that is none of end_ids changes nothing but tokens and text, until the last one
        self.is_plain = (
            self.penalties is None and params.logprobs is None
            and params.min_tokens == 0 and not params.stop
        )  # fmt: skip
        # how its next token is sampled depends on the ones before through the logits alone
        self.is_foreseeable = self.penalties is None and not self.has_changing_bias
        self.end_ids = admitted.eos_token_ids | admitted.stop_token_ids
        self.most_tokens = self.num_prompt_tokens + admitted.max_tokens
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_sent_chars = 0
        self.num_sent_tokens = 0
        self.has_sent_all = False

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token_id: int, entry: TokenLogprobs | None) -> None:
        """Take in one output token, with its log-probabilities if they were asked for."""
        self.tokens.append(token_id)
        if self.penalties is not None:
            self.penalties.add(token_id)
        if self.logprobs is not None and entry is not None:
            self.logprobs.append(entry)
            self.cumulative_logprob += entry[token_id].logprob

    def append_text(self, token_id: int) -> str | None:
        """Take in the last token's text; return the stop string that it completed."""
        if self.text is None:
            return None
        can_stop = self.num_output_tokens > self.admitted.params.min_tokens
        return self.text.append(token_id, can_stop)

    def next_chunk(self) -> StreamChunk:
        """Return what a stream has not sent yet."""
        text = ""
        ids = self.tokens[self.num_prompt_tokens + self.num_sent_tokens :]
        logprobs = None if self.logprobs is None else self.logprobs[self.num_sent_tokens :]
        self.num_sent_tokens += len(ids)
        if self.text is not None:
            text = self.text.text[self.num_sent_chars : self.text.num_released]
            self.num_sent_chars = self.text.num_released
        return StreamChunk(text, ids, self.finish_reason, logprobs, self.index)

    def output(self) -> CompletionOutput:
        """Return what the caller sees of it."""
        assert self.finish_reason is not None
        return CompletionOutput(
            index=self.index,
            text="" if self.text is None else self.text.text,
            token_ids=self.output_token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
        )


@dataclass(frozen=True)
class Progress:
    """What a completion's reader has already, from an engine that is gone: it goes on after that.

    index: which of the n completions it is; it goes on as a request of its own.
    """

    token_ids: Seq[int]
    num_chars: int
    logprobs: Seq[TokenLogprobs] | None = None
    index: int = 0


class Request:
    """One admitted request: its sequences, its prompt's results, and where they are delivered."""

    def __init__(
        self,
        admitted: Admitted,
        tokenizer: Tokenizer | None,
        streams: bool,
        on_change: Callable[[], None] | None = None,
        first_index: int = 0,
    ) -> None:
        self.request_id = -1  # given by the engine when it is submitted
        self.admitted = admitted
        count = admitted.params.n
        indices = range(first_index, first_index + count)
        self.sequences = [Sequence(admitted, i, tokenizer) for i in indices]
        self.num_unfinished = count
        self.streams = streams
        self.is_probe = False  # the watchdog's own, not counted in the metrics
        self.delivery = Delivery(on_change, indices)
        self.logits: Floats | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if admitted.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.submitted_us = 0
        self.deadline_us: int | None = None
        self.is_gone = False  # its reader has left: an abort is a disconnect
        self.started_us: int | None = None
        self.first_token_us: int | None = None
        self.last_token_us = 0
        self.finished_us = 0

    def number(self, request_id: int, sequence_id: int, engine_seed: int, now_us: int) -> None:
        """Give the request its number, and with it ids and seeds for its sequences."""
        seed = self.admitted.params.seed
        if seed is None:
            seed = mix_seed(engine_seed, request_id)
        self.request_id = request_id
        self.submitted_us = now_us
        if self.sequences[0].num_sent_tokens:  # resumed: its first token was long ago
            self.first_token_us = self.last_token_us = now_us
        if self.admitted.params.timeout_s is not None:
            self.deadline_us = now_us + int(self.admitted.params.timeout_s * 1e6)
        for place, sequence in enumerate(self.sequences):
            sequence.sequence_id = sequence_id + place
            sequence.seed = as_int64(mix_seed(seed, sequence.index))

    def resume(self, progress: Progress) -> None:
        """Take up where an engine that is gone left off, as if every step had been run here."""
        sequence = self.sequences[0]
        assert len(self.sequences) == 1 and self.streams, "only a stream can be resumed"
        for place, token_id in enumerate(progress.token_ids):
            entry = None if progress.logprobs is None else progress.logprobs[place]
            sequence.append(token_id, entry)
            assert sequence.append_text(token_id) is None, "it had ended already"
        sequence.num_sent_tokens = len(progress.token_ids)
        sequence.num_sent_chars = progress.num_chars

    def next_chunks(self) -> list[StreamChunk]:
        """Return what a stream has not sent yet of each completion, and the ends of them."""
        if not self.streams:
            return []
        chunks = []
        for sequence in self.sequences:
            if not sequence.has_sent_all:
                chunks.append(sequence.next_chunk())
                sequence.has_sent_all = sequence.finish_reason is not None
        return chunks

    def decode_texts(self) -> None:
        """Decode the texts of a request that has ended, in the thread that wants them."""
        for sequence in self.sequences:
            if sequence.text is not None:
                sequence.text.decode()

    def output(self) -> RequestOutput:
        """Return the result; every sequence has finished."""
        start, first, admitted = self.submitted_us, self.first_token_us, self.admitted
        metrics = RequestMetrics(
            queue_us=None if self.started_us is None else self.started_us - start,
            ttft_us=None if first is None else first - start,
            total_us=self.finished_us - start,
            num_preemptions=sum(s.num_preemptions for s in self.sequences),
            num_cached_tokens=self.sequences[0].num_cached_tokens,
        )
        outputs = [sequence.output() for sequence in self.sequences]
        ids = list(admitted.prompt_token_ids)
        id_ = self.request_id
        return RequestOutput(id_, admitted.prompt, ids, outputs, metrics, self.prompt_logprobs)
