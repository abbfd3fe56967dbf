"""The steps that were handed to the worker and have not come back, and what their results do to those who are in them.

A step remembers its sequences by themselves, and its rows with their epochs: so a result finds a sequence that has left its
row, and leaves the row's next tenant alone. Row 4, with steps 7 and 8 in flight:

    step 7 comes back    its token ends A; the scheduler frees the row, and its epoch becomes 1
    step 9 is planned    B moves into row 4
    step 8 comes back    it knows row 4 of epoch 0: its token is for A, which has ended, and is thrown away

Had A been preempted instead, it would get the token where it waits. Does not know how a step is planned, nor what else goes
when a sequence ends: it says which have, and the scheduler lets go of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from quire.core.batch import Batch
from quire.core.beam_groups import BeamGroups
from quire.core.budget import TokenBudget
from quire.core.forks import WaitingForks
from quire.core.kv_cache import KVCacheManager
from quire.core.preemption import PreemptionPolicy
from quire.core.sequence import FinishReason, RequestGroup, Sequence, Status
from quire.core.step import SchedulerOutput, StepOutput
from quire.core.stop import cut_behind_end, find_end
from quire.core.transfers import Transfers


@dataclass(slots=True)
class StepTokens:
    """What a step gave: `token_ids[i]` is a new token of `sequences[i]`, drawn by sample `samples[i]` of the StepOutput. A
    sequence with several new tokens stands there several times. Sequences that ended are in `finished`, also those that got
    no token, by an error."""

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    beam_groups: list[RequestGroup] = field(default_factory=list)  # whose beams have moved on by a token
    prompt_entries: list[tuple[Sequence, int, int]] = field(default_factory=list)  # sequence, entry, first position


@dataclass(slots=True)
class _Flight:
    """A step that was handed to the worker: who is in it, so that its result finds them even if they have left their row."""

    output: SchedulerOutput
    rows: np.ndarray  # scheduled rows, then those that were forked in this step
    ends: np.ndarray  # their num_scheduled when the step has run
    epochs: np.ndarray
    sequences: np.ndarray
    sample_index: np.ndarray  # sample -> index into the above
    is_beam: np.ndarray  # bool, by sample


class StepsInFlight:
    """In the order in which they were planned, which is the one in which they come back. `budget` and `policy` learn from
    them what tokens and transfers take; the next guesses are left in the budget's drafts."""

    def __init__(
        self,
        batch: Batch,
        kv: KVCacheManager,
        forks: WaitingForks,
        beams: BeamGroups,
        transfers: Transfers,
        budget: TokenBudget,
        policy: PreemptionPolicy,
    ) -> None:
        self._batch = batch
        self._kv = kv
        self._forks = forks
        self._beams = beams
        self._transfers = transfers
        self._budget = budget
        self._policy = policy
        self._flights: deque[_Flight] = deque()
        self._last_step = -1  # that was planned, whether or not it has come back

    def __len__(self) -> int:
        return len(self._flights)

    def add(
        self, output: SchedulerOutput, rows: np.ndarray, ends: np.ndarray, sample_index: np.ndarray, is_beam: np.ndarray
    ) -> None:
        """A step was planned; the arrays are as in `_Flight`."""
        epochs, sequences = self._batch.epoch[rows], self._batch.sequences[rows]
        self._flights.append(_Flight(output, rows, ends, epochs, sequences, sample_index, is_beam))
        self._last_step = output.step_id

    def complete(self, result: StepOutput) -> StepTokens:
        """Takes the result of the oldest step: appends tokens, publishes full blocks, says in `finished` whom to end."""
        flight = self._flights.popleft()
        assert flight.output.step_id == result.step_id, "steps come back in order"
        batch, kv = self._batch, self._kv
        self._finish_transfers(result.finished_transfers)
        kv.pool.complete_step(result.step_id)
        kv.host_pool.complete_step(result.step_id)
        self._measure(flight.output, result)
        given = StepTokens()
        here = batch.epoch[flight.rows] == flight.epochs
        rows, ends = flight.rows, flight.ends
        if np.count_nonzero(here) < len(rows):
            rows, ends = rows[here], ends[here]
            for i in np.flatnonzero(~here).tolist():
                sequence = flight.sequences[i]
                if sequence.status is Status.SWAPPED:
                    sequence.set_computed(int(flight.ends[i]))
        batch.num_computed[rows] = ends
        for entry in result.prompt_logprobs:
            if not flight.sequences[entry].is_finished:  # another request may have its id by now
                given.prompt_entries.append((flight.sequences[entry], entry, int(flight.output.starts[entry])))

        token_ids = np.asarray(result.token_ids, dtype=np.int32)
        plain = here[flight.sample_index] & ~flight.is_beam
        if result.errors:
            plain[list(result.errors)] = False
        if flight.output.draft_token_ids:
            plain &= ~np.isin(flight.sample_index, list(flight.output.draft_token_ids))
        samples = plain.nonzero()[0]
        self._append(flight, token_ids, samples, given)
        if len(samples) < len(plain):
            for sample in np.flatnonzero(~plain).tolist():
                self._append_special(flight, result, sample, given)
        # after the new tokens are known: a full block's name needs none of them, but its owner may have ended
        self._publish(flight, here)
        given.beam_groups, ended = self._beams.decide()
        given.finished += ended
        for sample, guesses in result.draft_token_ids.items():
            sequence = flight.sequences[flight.sample_index[sample]]
            if sequence.status is Status.RUNNING:
                self._budget.drafts[sequence.row] = guesses
        return given

    def _measure(self, output: SchedulerOutput, result: StepOutput) -> None:
        """What the step tells of the machine: what tokens cost, and how fast blocks move."""
        decoding = int(np.count_nonzero(output.num_tokens == 1))
        prefill = output.total_num_tokens - decoding
        seconds = result.elapsed_s - result.transfer_s
        if len(output.rows):
            if self._budget.step_target_s is not None:
                self._budget.pace.observe(decoding, prefill, int(output.starts.sum()), seconds)
            if prefill > 3 * decoding:
                self._policy.note_prefill(prefill, seconds)
        moved = sum(len(transfer.pairs) for transfer in (*output.swap_out, *output.swap_in))
        if moved and result.transfer_s:
            block_bytes = self._kv.groups[0].block_bytes(self._kv.block_size)  # every cache group's
            self._policy.note_transfer(moved * block_bytes, result.transfer_s)

    def _append(self, flight: _Flight, token_ids: np.ndarray, samples: np.ndarray, given: StepTokens) -> None:
        """One token each for sequences that are where they were: the way of nearly all tokens, in arrays."""
        if not len(samples):
            return
        batch = self._batch
        rows = flight.rows[flight.sample_index[samples]]
        tokens = token_ids[samples]
        counts = batch.num_tokens[rows]
        batch.token_ids[rows, counts] = tokens
        counts += 1
        batch.num_tokens[rows] = counts
        batch.num_pending[rows] -= 1
        sequences = batch.sequences[rows]
        given.sequences += sequences.tolist()
        given.token_ids += tokens.tolist()
        given.samples += samples.tolist()
        stopped = np.logical_or.reduce(batch.stop_ids[rows] == tokens[:, None], 1) & (counts >= batch.min_total[rows])
        ended = stopped | (counts >= batch.max_total[rows]) | batch.has_many_stop_ids[rows]
        for i in ended.nonzero()[0].tolist():
            self._check_end(sequences[i], given)

    def _append_special(self, flight: _Flight, result: StepOutput, sample: int, given: StepTokens) -> None:
        """A sample that failed, gave several tokens or candidates, or whose sequence has left its row."""
        index = int(flight.sample_index[sample])
        sequence: Sequence = flight.sequences[index]
        if sequence.is_finished:
            return
        if sample in result.errors:
            sequence.finish_reason, sequence.error = FinishReason.ERROR, result.errors[sample]
            given.finished.append(sequence)  # of a beam search, all beams with it
            return
        if flight.is_beam[sample]:
            self._beams.take(sequence, result.candidates[sample])
            return
        had_drafts = index in flight.output.draft_token_ids
        tokens = list(result.accepted.get(sample, [int(result.token_ids[sample])]))
        if sequence.status is not Status.RUNNING:
            cut_behind_end(sequence, tokens)
            sequence.append_while_waiting(tokens)
            if sequence.status is Status.SWAPPED and had_drafts:
                sequence.rewind(sequence.num_tokens - 1)
        else:
            row, batch = sequence.row, self._batch
            cut_behind_end(sequence, tokens)
            count = int(batch.num_tokens[row])
            batch.token_ids[row, count : count + len(tokens)] = tokens
            batch.num_tokens[row] = count + len(tokens)
            batch.num_pending[row] -= 1
            if had_drafts:
                # guesses that were wrong have left keys and values behind: the next step writes over them
                batch.num_scheduled[row] = batch.num_computed[row] = count + len(tokens) - 1
                self._forks.set_limit(sequence)
        given.sequences += [sequence] * len(tokens)
        given.token_ids += tokens
        given.samples += [sample] * len(tokens)
        self._check_end(sequence, given)

    @staticmethod
    def _check_end(sequence: Sequence, given: StepTokens) -> None:
        end = find_end(sequence)
        if end is not None:
            sequence.finish_reason, sequence.stop_reason = end
            given.finished.append(sequence)

    def _publish(self, flight: _Flight, here: np.ndarray) -> None:
        """Blocks that this step filled get their names; blocks that windows have left behind are let go."""
        batch, kv = self._batch, self._kv
        rows = flight.rows[here]
        size = kv.block_size
        if kv.enable_prefix_caching:
            computed = np.minimum(batch.num_computed[rows], batch.num_tokens[rows])
            # a row completed a block if a border lies in what it computed: a decoding one is looked at once a block
            starts = np.zeros(len(flight.rows), dtype=np.int32)
            starts[: len(flight.output.starts)] = flight.output.starts
            filled = computed // size > starts[here] // size
            if np.count_nonzero(filled):
                kv.publish(rows[filled], computed[filled])
        kv.free_behind_windows(rows, self._last_step)

    def _finish_transfers(self, transfer_ids: list[int]) -> None:
        arrived = []
        for transfer_id in transfer_ids:
            for sequence in self._transfers.finish(transfer_id):
                self._forks.set_limit(sequence)
                self._beams.touch(sequence.group)
                arrived.append(sequence.row)
        if not arrived:
            return
        rows = np.asarray(arrived, dtype=np.intp)
        self._kv.publish(rows, np.minimum(self._batch.num_computed[rows], self._batch.num_tokens[rows]))
        self._kv.free_behind_windows(rows, self._last_step)
