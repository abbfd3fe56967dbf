"""Applies what a beam search decides: a beam that goes on keeps its row, one that splits is forked, one that lost is freed.

A group decides when all its live beams have told their candidates, in whichever steps they did. Until then a beam that has
told waits; what it told stays good while its group is swapped out, and is asked for again when it is recomputed. Does not
know how beams are ranked: `BeamSearch` does.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.core.beam import Beam, End
from quire.core.rows import RowKeeper
from quire.core.sequence import FinishReason, RequestGroup, Sequence, Status
from quire.core.step import Candidates


class BeamGroups:
    """Takes candidates; `decide` then moves the beams of the groups that are ready."""

    def __init__(self, rows: RowKeeper, leave_row: Callable[[Sequence], None]) -> None:
        self._rows = rows
        self._leave_row = leave_row
        self._touched: dict[str, RequestGroup] = {}

    def take(self, sequence: Sequence, candidates: Candidates) -> None:
        """What a step told of a beam. One that waits to be recomputed will tell again."""
        if sequence.status in (Status.RUNNING, Status.SWAPPED):
            sequence.candidates = candidates
            self.touch(sequence.group)

    def touch(self, group: RequestGroup) -> None:
        """The group may be able to decide."""
        if group.beam is not None:
            self._touched[group.request_id] = group

    def decide(self) -> tuple[list[RequestGroup], list[Sequence]]:
        """Groups that have moved on by a token, and the beams of those that are done or cannot go on."""
        moved: list[RequestGroup] = []
        ended: list[Sequence] = []
        touched, self._touched = self._touched, {}
        for group in touched.values():
            live = group.live
            if live and all(beam.status is Status.RUNNING and beam.candidates is not None for beam in live):
                moved.append(group)
                ended += self._advance(group, live)
        return moved, ended

    def _advance(self, group: RequestGroup, live: list[Sequence]) -> list[Sequence]:
        search = group.beam
        assert search is not None
        candidates = [sequence.candidates for sequence in live if sequence.candidates is not None]
        survivors = search.advance(candidates, lambda beam, token: end_of(group, beam, token))
        if not survivors:
            for sequence in live:
                if search.finished:
                    sequence.finish_reason = FinishReason(search.finished[0].reason)
                else:
                    sequence.finish_reason = FinishReason.ERROR
                    sequence.error = "no token is allowed here: what the request bans leaves no beam"
            return live
        heirs = {survivor.parent for survivor in survivors}
        for index, sequence in enumerate(live):
            if index not in heirs:  # first, so that there are rows for those that split
                self._leave_row(sequence)
                sequence.status = Status.FINISHED
        beams: list[Sequence] = []
        first: set[int] = set()
        for survivor in survivors:
            parent = live[survivor.parent]
            beams.append(parent if survivor.parent not in first else self._rows.fork(parent))
            first.add(survivor.parent)
        for sequence, survivor in zip(beams, survivors):
            sequence.candidates = None
            self._rows.append(sequence, survivor.beam.token)
        group.sequences = beams
        self._rows.keep_for(group)
        return []


def end_of(group: RequestGroup, beam: Beam, token: int) -> End | None:
    """How `token` behind `beam` ends the answer, if it does. Before min_tokens no token stops, and no text within them."""
    length = beam.length + 1
    if length >= group.params.min_tokens:
        if token in group.stop_token_ids:
            return "stop", None
        if token in (group.params.stop_token_ids or ()):
            return "stop", token
        if group.find_stop_string is not None and length > group.params.min_tokens:
            found = group.find_stop_string(beam, token)
            if found is not None:
                return "stop", found
    return ("length", None) if length >= group.max_tokens else None
