"""Beam search as pure decisions: candidates in, beams to keep, fork, finish out.

The rules, ties aside, are those of transformers' `generate(num_beams=width)`, step by step:

1. Of all live beams' candidates, the `max(2, 1 + number of end tokens) * width` with the highest accumulated log
   probability are ranked: so many that `width` of them are no end tokens, whatever ends.
2. The first `width` of them that do not end are the next live beams.
3. One that ends is a finished hypothesis if its rank is below `width`. Its score is log probability / length **
   length_penalty. Of the hypotheses, the `width` with the best scores stay.
4. The search is over when no live beam is left, or when `early_stopping` says so (see `BeamSearchParams`).

Scores are float32, as in the reference: in float64 other beams would win now and then. Does not know blocks, rows, or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.step import Candidates, TokenInfo

# Gives why a candidate ends the answer, None if it does not: (parent's tokens, token) -> (finish reason, stop reason).
End = tuple[str, int | str | None]
EndOf = Callable[["Beam", int], End | None]


@dataclass(slots=True, eq=False)
class Beam:
    """A continuation of the prompt, as its last token and what comes before: beams share their beginnings.

    `score` is the sum of its tokens' log probabilities, penalties included; `info` what is known of the token's own.
    """

    parent: Beam | None = None
    token: int = -1  # the root, an empty continuation, has none
    length: int = 0
    score: np.float32 = field(default_factory=lambda: np.float32(0))
    info: TokenInfo | None = None

    def token_ids(self, last: int | None = None) -> list[int]:
        """Its tokens, or the last `last` of them."""
        tokens: list[int] = []
        beam: Beam | None = self
        while beam is not None and beam.length and (last is None or len(tokens) < last):
            tokens.append(beam.token)
            beam = beam.parent
        return tokens[::-1]

    def infos(self, last: int) -> list[TokenInfo | None]:
        """What is known of each of its last `last` tokens."""
        infos: list[TokenInfo | None] = []
        beam: Beam | None = self
        while beam is not None and beam.length and len(infos) < last:
            infos.append(beam.info)
            beam = beam.parent
        return infos[::-1]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. `score` is normalized by its length; `reason` is "stop" or "length"."""

    beam: Beam
    score: np.float32
    reason: str
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Survivor:
    """A live beam of the next step: it continues the beam that stood at index `parent` among the live ones."""

    parent: int
    beam: Beam


class BeamSearch:
    """The state of one search: `live` beams, best first, and `finished` hypotheses, best first.

    num_end_tokens: how many tokens may end it. max_tokens: the longest answer.
    """

    def __init__(
        self,
        width: int,
        *,
        num_end_tokens: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:
        self.width = width
        self.num_ranked = max(2, 1 + num_end_tokens) * width
        self.live: list[Beam] = [Beam()]
        self.finished: list[Hypothesis] = []
        self.is_done = False
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping

    def advance(self, candidates: Sequence[Candidates], end_of: EndOf) -> list[Survivor]:
        """One step: `candidates[i]` continue live beam i. Returns the next live beams; none when the search is over."""
        length = self.live[0].length + 1
        survivors: list[Survivor] = []
        ended: list[Hypothesis] = []
        for rank, (parent, token, score, info) in enumerate(self._ranked(candidates)):
            if rank >= self.width and (len(survivors) == self.width or length >= self._max_tokens):
                break  # whatever follows is neither kept nor finished
            beam = Beam(self.live[parent], token, length, score, info)
            end = end_of(self.live[parent], token)
            if end is None:
                if len(survivors) < self.width:
                    survivors.append(Survivor(parent, beam))
            elif rank < self.width:
                ended.append(Hypothesis(beam, self._normalized(score, length), *end))
        self._take(ended)
        self.live = [survivor.beam for survivor in survivors]
        self.is_done = not survivors or not self._can_improve(length)
        return [] if self.is_done else survivors

    def _ranked(self, candidates: Sequence[Candidates]) -> Iterator[tuple[int, int, np.float32, TokenInfo | None]]:
        """(index of the live beam, token, accumulated score, info), best first; what is banned (-inf) is not there."""
        counts = [len(found.token_ids) for found in candidates]
        parents = np.repeat(np.arange(len(candidates)), counts)
        scores = np.concatenate(
            [found.scores.astype(np.float32) + beam.score for found, beam in zip(candidates, self.live)]
        )
        columns = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort(-scores, kind="stable")[: self.num_ranked]
        for i in map(int, order):  # nearly always the first few are all that is looked at
            if not scores[i] > -np.inf:
                return
            parent, column = int(parents[i]), int(columns[i])
            found = candidates[parent]
            yield parent, int(found.token_ids[column]), scores[i], found.info(column)

    def _take(self, ended: list[Hypothesis]) -> None:
        """The best of old and new hypotheses stay; of equal ones, the older."""
        if self._early_stopping is True and len(self.finished) == self.width:
            return
        self.finished = sorted([*self.finished, *ended], key=lambda hypothesis: -hypothesis.score)[: self.width]

    def _normalized(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(float(length) ** self._length_penalty))

    def _can_improve(self, length: int) -> bool:
        """The best live beam may still beat the worst hypothesis, or fill an empty place."""
        if len(self.finished) < self.width:
            return True
        if self._early_stopping is True:
            return False
        at_most = self._max_tokens if self._early_stopping == "never" and self._length_penalty > 0 else length
        return bool(self._normalized(self.live[0].score, at_most) > self.finished[-1].score)

    # -- what is told ----------------------------------------------------------------------------------------------------
    def settled(self) -> Beam:
        """What every answer begins with, whichever beams win: the beginning that all live and finished beams share."""
        beams = {id(beam): beam for beam in (*self.live, *(hypothesis.beam for hypothesis in self.finished))}
        while len(beams) > 1:  # the longest ones step back until all meet
            longest = max(beam.length for beam in beams.values())
            back = [beam if beam.length < longest else beam.parent for beam in beams.values()]
            beams = {id(beam): beam for beam in back if beam is not None}
        (common,) = beams.values()
        return common

    def best(self, count: int) -> list[Hypothesis]:
        """The `count` best hypotheses. One that is aborted gives its live beams for what is missing."""
        found = self.finished[:count]
        for beam in self.live[: count - len(found)] if not self.is_done else []:
            if beam.length:
                found.append(Hypothesis(beam, self._normalized(beam.score, beam.length), "abort", None))
        return found
