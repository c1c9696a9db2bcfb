"""What callers get back: vLLM's names, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token from the raw logits; rank 1 is the most likely token."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # the chosen token first, then the best ones


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request in microseconds, from its submission."""

    queue_us: int | None  # until its first step
    ttft_us: int | None  # until its first token (None: there was none)
    total_us: int
    num_preemptions: int
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at the first try


@dataclass
class CompletionOutput:
    """One of the n completions. `token_ids` are all that were generated, a stop token included.

    finish_reason: "stop" | "length" | "abort" | "error". stop_reason: the stop string or stop token
    id that ended it; "timeout" for an abort by timeout_s; else None.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """All about one finished request; prompt_logprobs[0] is None, nothing comes before it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text


@dataclass(frozen=True)
class StreamChunk:
    """What came since the last chunk: never half a character, nothing that a stop string cuts.

    index: which of the n completions; the last chunk of each has its finish_reason.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None  # one a token, if the request asked for them
    index: int = 0
