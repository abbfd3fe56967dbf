"""Tokens in, `RequestOutput`s out: text, stop strings, log probabilities, times.

One `RequestState` for each request holds what its caller has been or will be told. Does not know blocks or steps.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from quire.core.sequence import RequestGroup, Sequence
from quire.engine.detokenizer import IncrementalDetokenizer
from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from quire.sampling_params import RequestOutputKind, SamplingParams


@dataclass(slots=True)
class _Completion:
    """One sequence's answer so far; `num_told` tokens of it have been told to a caller who wants increments."""

    sequence: Sequence
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_told: int = 0
    was_told_end: bool = False
    waiting: list[int] = field(default_factory=list)  # tokens that are detokenized when the answer is complete


class RequestState:
    """What one request's caller gets. `tokenizer` None: no text."""

    def __init__(self, group: RequestGroup, text: str | None, tokenizer: Tokenizer | None) -> None:
        self.group = group
        self.text = text
        self.metrics = RequestMetrics(arrival_time=group.arrival_s)
        self._tokenizer = tokenizer
        self._params: SamplingParams = group.params
        self._completions: dict[int, _Completion] = {}
        self._prompt_token_ids: list[int] = group.prompt_token_ids.tolist()  # once: every output of a stream has them
        prompt = len(self._prompt_token_ids)
        asked = group.params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] * prompt if asked else None
        # without stop strings, nobody reads the text of an unfinished answer: it is decoded in one go at the end
        self._is_lazy = group.params.output_kind is RequestOutputKind.FINAL_ONLY and not group.params.stop_strings

    # -- what comes in ---------------------------------------------------------------------------------------------------
    def append(self, sequence: Sequence, token_id: int, logprobs: object, now_s: float) -> str | None:
        """Takes one token; returns the stop string that it completed, if it did. What follows that is ignored."""
        completion = self._completion(sequence)
        if completion.finish_reason is not None:
            return None
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now_s
        self.metrics.last_token_time = now_s
        completion.token_ids.append(token_id)
        if logprobs is not None:
            self._take_logprobs(completion, logprobs)
        if self._is_lazy:
            completion.waiting.append(token_id)
            return None
        match = completion.detokenizer.append([token_id], self._ends_silently(sequence, len(completion.token_ids)))
        if match is None:
            return None
        completion.finish_reason, completion.stop_reason = "stop", match.stop_string
        return match.stop_string

    def finish(self, sequence: Sequence, now_s: float) -> None:
        """The core has ended a sequence."""
        completion = self._completion(sequence)
        if completion.finish_reason is None:
            assert sequence.finish_reason is not None
            completion.finish_reason = sequence.finish_reason.value
            completion.stop_reason = sequence.error or sequence.stop_reason
        if completion.waiting:
            completion.detokenizer.append(completion.waiting, self._ends_silently(sequence, len(completion.token_ids)))
            completion.waiting = []
        self.metrics.finished_time = now_s

    def take_prompt_logprobs(self, first_position: int, found: object) -> None:
        """`found` are of the tokens at first_position + 1 and after; those computed again after a preemption are the same."""
        assert self._prompt_logprobs is not None
        for i, row in enumerate(zip(found.token_ids, found.logprobs, found.ranks)):  # type: ignore[attr-defined]
            self._prompt_logprobs[first_position + 1 + i] = self._as_dict(*row)

    def _completion(self, sequence: Sequence) -> _Completion:
        completion = self._completions.get(sequence.branch)
        if completion is None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, self.group.prompt_token_ids[-16:].tolist(), self._params
            )
            completion = self._completions[sequence.branch] = _Completion(sequence, detokenizer)
            if self._params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        return completion

    def _ends_silently(self, sequence: Sequence, num_tokens: int) -> bool:
        """The last token is one that ended the sequence, and is not part of the text."""
        is_last = sequence.finish_reason is not None and num_tokens == sequence.num_output_tokens
        return is_last and sequence.finish_reason.value == "stop" and not isinstance(sequence.stop_reason, str)  # type: ignore[union-attr]

    def _take_logprobs(self, completion: _Completion, row: object) -> None:
        assert completion.logprobs is not None and completion.cumulative_logprob is not None
        found = self._as_dict(row.token_ids, row.logprobs, row.ranks)  # type: ignore[attr-defined]
        completion.logprobs.append(found)
        completion.cumulative_logprob += float(row.logprobs[0])  # type: ignore[attr-defined]

    def _as_dict(
        self, token_ids: SequenceOf[int], logprobs: SequenceOf[float], ranks: SequenceOf[int]
    ) -> TokenLogprobs:
        result: TokenLogprobs = {}
        for token, logprob, rank in zip(token_ids, logprobs, ranks):
            if int(token) not in result:
                text = self._tokenizer.token_text(int(token)) if self._tokenizer else None
                result[int(token)] = Logprob(float(logprob), int(rank), text)
        return result

    # -- what goes out -----------------------------------------------------------------------------------------------------
    def take_output(self) -> RequestOutput | None:
        """What the caller is to hear now, by the request's output kind; None if that is nothing."""
        kind = self._params.output_kind
        is_finished = self.group.is_finished
        if kind is RequestOutputKind.FINAL_ONLY and not is_finished:
            return None
        completions = [self._completions[branch] for branch in sorted(self._completions)]
        if kind is RequestOutputKind.DELTA:
            completions = [
                c for c in completions if not c.was_told_end and (c.finish_reason or c.num_told < len(c.token_ids))
            ]
            outputs = [self._increment(completion) for completion in completions]
        else:
            outputs = [self._whole(completion) for completion in completions]
        self.metrics.num_preemptions = self.group.num_preemptions
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self.text,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=is_finished,
            metrics=self.metrics,
            num_cached_tokens=self.group.num_cached_tokens,
        )

    @staticmethod
    def _whole(completion: _Completion) -> CompletionOutput:
        return CompletionOutput(
            index=completion.sequence.branch,
            text=completion.detokenizer.shown_text(completion.finish_reason is not None),
            token_ids=list(completion.token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            stop_reason=completion.stop_reason,
        )

    @staticmethod
    def _increment(completion: _Completion) -> CompletionOutput:
        told, is_finished = completion.num_told, completion.finish_reason is not None
        completion.num_told, completion.was_told_end = len(completion.token_ids), is_finished
        return CompletionOutput(
            index=completion.sequence.branch,
            text=completion.detokenizer.take_delta(is_finished),
            token_ids=completion.token_ids[told:],
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else completion.logprobs[told:],
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            stop_reason=completion.stop_reason,
        )
