"""What a request gives back, with vLLM's field names. Plain data: it knows neither the engine nor HTTP, and loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability under the raw model distribution (natural logarithm, before penalties and temperature).

    rank: 1 for the likeliest token of the vocabulary. decoded_token: its text alone, None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Of one position: the token itself first, then the likeliest others by falling probability.
TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    index: which of the request's n. text, token_ids, logprobs: everything so far, or only what is new, by the request's
    output_kind. logprobs: one dict for each token id, None if not asked for. finish_reason: None while running; "stop" with
    stop_reason = the stop string, the stop token's id, or None for end-of-sequence; "length", "abort" or "error".
    beam_score: of a beam search's hypothesis, cumulative_logprob / length ** length_penalty.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    beam_score: float | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam, with vLLM's names: `tokens` and `text` begin with the prompt. score: cum_logprob / length **
    length_penalty, length in tokens of the answer. logprobs: of the answer's tokens, if they were asked for."""

    tokens: list[int]
    cum_logprob: float
    score: float
    text: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock; None while they have not."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that had tokens of this request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The state of a request after a step, or its result.

    prompt: the text, None if token ids were given. prompt_logprobs: one dict for each prompt token, the first None since
    nothing precedes it. num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
