"""Tokens in, `RequestOutput`s out: text, stop strings, log probabilities, times.

One `RequestState` for each request holds what its caller has been or will be told. Does not know blocks or steps.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from quire.core.beam import Beam
from quire.core.sequence import FinishReason, RequestGroup, Sequence
from quire.engine.detokenizer import IncrementalDetokenizer
from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from quire.sampling_params import RequestOutputKind, SamplingParams


@dataclass(slots=True)
class _Completion:
    """One sequence's answer so far; `num_told` tokens of it have been told to a caller who wants increments."""

    index: int
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_told: int = 0
    was_told_end: bool = False
    beam_score: float | None = None


class RequestState:
    """What one request's caller gets, who asked for `params`. `tokenizer` None: no text."""

    def __init__(
        self, group: RequestGroup, text: str | None, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.group = group
        self.text = text
        self.metrics = RequestMetrics(arrival_time=group.arrival_s)
        self._tokenizer = tokenizer
        self._params = params
        self._chooses_best = params.num_sequences > params.n and not params.use_beam_search
        self._completions: dict[int, _Completion] = {}
        self._prompt_token_ids: list[int] = group.prompt_token_ids.tolist()  # once: every output of a stream has them
        prompt = len(self._prompt_token_ids)
        asked = group.params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] * prompt if asked else None
        self.is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY or self._chooses_best
        # without stop strings, nobody reads the text of an unfinished answer: it is decoded in one go at the end
        self._is_lazy = self.is_final_only and not group.params.stop_strings

    # -- what comes in ---------------------------------------------------------------------------------------------------
    def append(self, sequence: Sequence, token_id: int, logprobs: object, now_s: float) -> str | None:
        """Takes one token; returns the stop string that it completed, if it did. What follows that is ignored."""
        completion = self._completions.get(sequence.branch) or self._completion(sequence)
        if completion.finish_reason is not None:
            return None
        metrics = self.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now_s
        metrics.last_token_time = now_s
        completion.token_ids.append(token_id)
        if logprobs is not None:
            self._take_logprobs(completion, logprobs)
        if self._is_lazy:
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
        if self._is_lazy and (waiting := completion.token_ids[completion.detokenizer.num_tokens :]):
            completion.detokenizer.append(waiting, self._ends_silently(sequence, len(completion.token_ids)))
        self.metrics.finished_time = now_s

    def take_prompt_logprobs(self, first_position: int, found: object) -> None:
        """`found` are of the tokens at first_position + 1 and after; those computed again after a preemption are the same."""
        assert self._prompt_logprobs is not None
        for i, row in enumerate(zip(found.token_ids, found.logprobs, found.ranks)):  # type: ignore[attr-defined]
            self._prompt_logprobs[first_position + 1 + i] = self._as_dict(*row)

    def _completion(self, sequence: Sequence) -> _Completion:
        completion = self._completions.get(sequence.branch)
        if completion is None:
            completion = self._completions[sequence.branch] = self._new_completion(sequence.branch)
        return completion

    def _new_completion(self, index: int) -> _Completion:
        detokenizer = IncrementalDetokenizer(self._tokenizer, self.group.prompt_token_ids[-16:].tolist(), self._params)
        completion = _Completion(index, detokenizer)
        if self._params.logprobs is not None:
            completion.logprobs = []
        if self.group.params.logprobs is not None:
            completion.cumulative_logprob = 0.0
        return completion

    def _ends_silently(self, sequence: Sequence, num_tokens: int) -> bool:
        """The last token is one that ended the sequence, and is not part of the text."""
        is_last = sequence.finish_reason is not None and num_tokens == sequence.num_output_tokens
        return is_last and sequence.finish_reason.value == "stop" and not isinstance(sequence.stop_reason, str)  # type: ignore[union-attr]

    def _take_logprobs(self, completion: _Completion, row: object) -> None:
        assert completion.cumulative_logprob is not None
        if completion.logprobs is not None:
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
        is_finished = self.group.is_finished
        if self.is_final_only and not is_finished:
            return None
        if self._params.output_kind is RequestOutputKind.DELTA:
            outputs = self._increments()
            if not outputs and not is_finished:  # beams that have moved on, and share no more than before
                return None
        else:
            outputs = self._wholes()
        self.metrics.num_preemptions = self.group.num_preemptions
        return RequestOutput(  # by position, as above
            self.group.request_id,
            self.text,
            self._prompt_token_ids,
            self._prompt_logprobs,
            outputs,
            is_finished,
            self.metrics,
            self.group.num_cached_tokens,
        )

    def _increments(self) -> list[CompletionOutput]:
        completions = self._completions
        told = [completions[branch] for branch in sorted(completions)] if len(completions) > 1 else completions.values()
        return [
            self._increment(c)
            for c in told
            if not c.was_told_end and (c.finish_reason or c.num_told < len(c.token_ids))
        ]

    def _wholes(self) -> list[CompletionOutput]:
        outputs = [self._whole(self._completions[branch]) for branch in sorted(self._completions)]
        if self._chooses_best:
            best = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[: self._params.n]
            return [replace(output, index=index) for index, output in enumerate(best)]
        return outputs

    @staticmethod
    def _whole(completion: _Completion) -> CompletionOutput:
        return CompletionOutput(
            index=completion.index,
            text=completion.detokenizer.shown_text(completion.finish_reason is not None),
            token_ids=list(completion.token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            stop_reason=completion.stop_reason,
            beam_score=completion.beam_score,
        )

    @staticmethod
    def _increment(completion: _Completion) -> CompletionOutput:
        told, is_finished = completion.num_told, completion.finish_reason is not None
        completion.num_told, completion.was_told_end = len(completion.token_ids), is_finished
        return CompletionOutput(  # by position, which takes half the time: there is one for each token of a stream
            completion.index,
            completion.detokenizer.take_delta(is_finished),
            completion.token_ids[told:],
            completion.cumulative_logprob,
            None if completion.logprobs is None else completion.logprobs[told:],
            completion.finish_reason,  # type: ignore[arg-type]
            completion.stop_reason,
            completion.beam_score,
        )


class BeamState(RequestState):
    """What the caller of a beam search gets: while it runs, what all beams have in common; then the n best hypotheses."""

    def advance(self, now_s: float) -> None:
        """The group's beams have moved on by a token."""
        search = self.group.beam
        assert search is not None
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now_s
        self.metrics.last_token_time = now_s
        if search.is_done or self.is_final_only:
            return
        settled = search.settled()
        for index in range(self._params.n):
            self._extend(self._completion_at(index), settled)

    def finish(self, sequence: Sequence, now_s: float) -> None:
        """The search is over: all its beams end together."""
        search = self.group.beam
        assert search is not None
        if self.metrics.finished_time is not None:
            return
        self.metrics.finished_time = now_s
        assert sequence.finish_reason is not None
        best = search.best(self._params.n)
        for index in range(len(best), len(self._completions)):  # told of, but there are fewer hypotheses than asked for
            completion = self._completion_at(index)
            completion.finish_reason = sequence.finish_reason.value
        for index, hypothesis in enumerate(best):
            completion = self._completion_at(index)
            is_whole = sequence.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR)
            ends_silently = hypothesis.reason == "stop" and not isinstance(hypothesis.stop_reason, str)
            self._extend(completion, hypothesis.beam, ends_silently)
            completion.cumulative_logprob, completion.beam_score = float(hypothesis.beam.score), float(hypothesis.score)
            completion.finish_reason = hypothesis.reason if is_whole else sequence.finish_reason.value
            completion.stop_reason = hypothesis.stop_reason if is_whole else sequence.error
        if not self._completions:
            completion = self._completion_at(0)
            completion.finish_reason, completion.stop_reason = sequence.finish_reason.value, sequence.error

    def _completion_at(self, index: int) -> _Completion:
        if index not in self._completions:
            self._completions[index] = self._new_completion(index)
        return self._completions[index]

    def _extend(self, completion: _Completion, beam: Beam, ends_silently: bool = False) -> None:
        """Adds what `beam` has beyond what the completion has."""
        added = beam.length - len(completion.token_ids)
        if not added:
            return
        tokens = beam.token_ids(last=added)
        completion.token_ids += tokens
        completion.detokenizer.append(tokens, ends_silently)
        if completion.logprobs is not None:
            for token, info in zip(tokens, beam.infos(last=added)):
                assert info is not None
                ids, logprobs = [token, *info.top_ids], [info.logprob, *info.top_logprobs]
                completion.logprobs.append(self._as_dict(ids, logprobs, [info.rank, *range(1, len(ids))]))


def request_state(
    group: RequestGroup, text: str | None, params: SamplingParams, tokenizer: Tokenizer | None
) -> RequestState:
    """The state for a new request. `params`: what its caller asked for, of which the group's may ask more."""
    return (BeamState if params.use_beam_search else RequestState)(group, text, params, tokenizer)
