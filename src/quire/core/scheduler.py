"""Which sequences compute how many tokens in the next step, and what follows from the tokens that come back.

There is no prefill phase and no decode phase: each running sequence has tokens that are known but not computed, and a step
lets it catch up by some of them, within one token budget. `schedule` plans a step, `update` takes its result; several steps
may lie between them. Does not know tensors, text, or clocks.

Order of service: (priority, arrival). Decoding sequences get their one token each first, then the running ones that catch up,
then the waiting ones. Who runs out of blocks takes them from the last in that order.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from quire.core.admission import Admission, AdmissionControl, Shortage, common_start
from quire.core.batch import UNLIMITED, Batch
from quire.core.kv_cache import AllocationPlan, KVCacheManager, PrefixHit
from quire.core.preemption import Preemption, PreemptionPolicy, SwapForks
from quire.core.sequence import FinishReason, RequestGroup, Sequence, Status
from quire.core.step import Direction, NewRow, SchedulerOutput, StepOutput, Transfer
from quire.core.stop import cut_behind_end, find_end

ROW_DTYPE = np.int32


@dataclass(slots=True)
class StepTokens:
    """What a step gave: `token_ids[i]` is a new token of `sequences[i]`, drawn by sample `samples[i]` of the StepOutput. A
    sequence with several new tokens stands there several times. Sequences that ended are in `finished`, also those that got
    no token, by an error."""

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
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


@dataclass(slots=True)
class _WaitingFork:
    """`target` starts with the first `num_tokens` tokens of `source`, as soon as that has them."""

    source: Sequence
    target: Sequence
    num_tokens: int


@dataclass(slots=True)
class SchedulerCounts:
    """Running totals, for metrics."""

    steps: int = 0
    tokens: int = 0
    preemptions: Counter[Preemption] = field(default_factory=Counter)
    recomputed_tokens: int = 0
    swapped_blocks: Counter[Direction] = field(default_factory=Counter)


class Scheduler:
    """Holds every request from `add` to its end.

    `max_num_batched_tokens` is the budget of one step; `max_steps_in_flight` how many steps may be planned before the first
    of them has come back; `watermark` the share of blocks that an admission leaves free for those that run.
    """

    def __init__(
        self,
        batch: Batch,
        kv: KVCacheManager,
        *,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_steps_in_flight: int = 1,
        policy: PreemptionPolicy | None = None,
        watermark: float = 0.01,
    ) -> None:
        assert max_num_batched_tokens > 0 and max_steps_in_flight > 0
        self.batch = batch
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_steps_in_flight = max_steps_in_flight
        self.policy = policy or SwapForks()
        self.admission = AdmissionControl(batch, kv, max_num_batched_tokens, max_model_len, watermark)
        self.counts = SchedulerCounts()
        self.admitted: list[RequestGroup] = []  # for the first time, since the caller last emptied this list
        self.waiting_for: Shortage | None = None  # why the first waiting group was not admitted in the last step
        self._groups: dict[str, RequestGroup] = {}
        self._waiting: list[tuple[int, int, RequestGroup]] = []  # a heap; groups that ended meanwhile are skipped
        self._num_ended_waiting = 0  # such groups
        self._flights: deque[_Flight] = deque()
        self._forks: list[_WaitingFork] = []
        self._arriving: dict[int, list[Sequence]] = {}  # transfer -> sequences that run when it is done
        self._leaving: dict[int, RequestGroup] = {}  # transfer -> group that cannot come back before it is done
        self._swaps: list[Transfer] = []  # for the step being planned
        self._new_rows: list[Sequence] = []
        self._drafts: dict[int, list[int]] = {}  # row -> guesses
        self._kept_rows: dict[str, int] = {}  # request -> rows that are kept free for the forks after its prefill
        self._next_arrival = 0
        self._next_step = 0

    # -- requests come and go ------------------------------------------------------------------------------------------
    def add(self, group: RequestGroup) -> None:
        """Queues a group. Raises RequestError if it can never run, saying what it would take."""
        assert group.request_id not in self._groups
        prompt, params = len(group.prompt_token_ids), group.params
        left = self.max_model_len - prompt
        group.max_tokens = left if params.max_tokens is None else min(params.max_tokens, left)
        self.admission.check_ever(group)
        group.arrival = self._next_arrival
        self._next_arrival += 1
        self._groups[group.request_id] = group
        self._wait(group)

    def get(self, request_id: str) -> RequestGroup | None:
        return self._groups.get(request_id)

    def abort(self, request_id: str) -> bool:
        """Ends a request now; its blocks are free as soon as no step in flight touches them. False if it isn't there."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        for sequence in group.live:
            self.finish(sequence, FinishReason.ABORT)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends one sequence, whatever it is doing (a stop string was found, say)."""
        if sequence.is_finished:
            return
        was_waiting = sequence.status is not Status.RUNNING
        if sequence.status is Status.RUNNING:
            self._leave_row(sequence)
        elif sequence.status is Status.SWAPPED:
            self.kv.drop_host(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.group.is_finished:
            del self._groups[sequence.group.request_id]
            if was_waiting:
                self._num_ended_waiting += 1
                self._tidy_queue()

    def _tidy_queue(self) -> None:
        """Groups that ended while they waited leave the queue when they are more than half of it: O(1) for each."""
        if self._num_ended_waiting > len(self._waiting) // 2 + 16:
            self._waiting = [entry for entry in self._waiting if not entry[2].is_finished]
            heapq.heapify(self._waiting)
            self._num_ended_waiting = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - self._num_ended_waiting

    @property
    def num_running(self) -> int:
        return self.batch.num_running

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def _wait(self, group: RequestGroup) -> None:
        heapq.heappush(self._waiting, (*group.order, group))

    # -- plan a step ---------------------------------------------------------------------------------------------------
    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if there is nothing to do before a step in flight comes back."""
        if len(self._flights) >= self.max_steps_in_flight:
            return None
        self._run_forks()
        rows = self.batch.rows_in_order()
        counts = self._share_budget(rows)
        rows, counts, plan, was_short = self._make_room(rows, counts)
        self.kv.commit(plan, self._next_step - 1)
        starts = self.batch.num_scheduled[rows]
        parts = [(rows, starts, counts)]
        if not was_short:
            parts += self._admit(self.max_num_batched_tokens - int(counts.sum()))
        return self._emit(parts)

    def _share_budget(self, rows: np.ndarray) -> np.ndarray:
        """Tokens [R] that each running row computes: one for each that decodes, the rest in order to those that catch up."""
        batch = self.batch
        target = np.minimum(batch.num_tokens[rows] + batch.num_pending[rows], batch.max_total[rows] - 1)
        counts = np.maximum(np.minimum(target, batch.limit[rows]) - batch.num_scheduled[rows], 0)
        left = self.max_num_batched_tokens
        decoding = counts == 1
        num_decoding = int(np.count_nonzero(decoding))
        if num_decoding > left:
            counts[np.flatnonzero(decoding)[left:]] = 0
        left = max(left - num_decoding, 0)
        for i in np.flatnonzero(counts > 1).tolist():
            counts[i] = min(int(counts[i]), left)
            left -= int(counts[i])
        if self._drafts:
            self._add_drafts(rows, counts, left)
        return counts

    def _add_drafts(self, rows: np.ndarray, counts: np.ndarray, left: int) -> None:
        """Guessed tokens ride along with a row that decodes, as far as the budget and its length allow."""
        batch = self.batch
        for i, row in enumerate(rows.tolist()):
            guesses = self._drafts.get(row)
            if not guesses:
                continue
            room = int(batch.max_total[row] - 1 - batch.num_tokens[row])
            keep = min(len(guesses), left, room)
            if counts[i] != 1 or batch.num_pending[row] or keep <= 0:
                del self._drafts[row]
                continue
            self._drafts[row] = guesses[:keep]
            counts[i] += keep
            left -= keep

    def _make_room(self, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, AllocationPlan, bool]:
        """Rows that compute in this step, with blocks for all of them: preempts the last groups as far as it must.

        The fourth is True if somebody had to wait or go, so that nobody new is let in.
        """
        pool, batch = self.kv.pool, self.batch
        was_short = False
        rows, counts = rows[counts > 0], counts[counts > 0]
        while True:
            plan = self.kv.plan(rows, batch.num_scheduled[rows], counts)
            if plan.total <= pool.num_free:
                return rows, counts, plan, was_short
            was_short = True
            coming = pool.num_pending + self.kv.num_moving
            victim = batch.sequences[batch.rows_in_order()[-1]].group
            is_alone = batch.sequences[batch.rows_in_order()[0]].group is victim
            if plan.total <= pool.num_free + coming or is_alone:
                # what is missing is on its way: the last ones wait for it
                assert coming or len(rows) > 1 or self._flights, "a group that was admitted alone does not fit"
                fitting = int(np.searchsorted(np.cumsum(plan.needed), pool.num_free, side="right"))
                keep = min(fitting, len(rows) - 1)
                for row in rows[keep:].tolist():
                    self._drafts.pop(row, None)
                rows, counts = rows[:keep], counts[:keep]
            else:
                self._preempt(victim)
                rows = batch.rows_in_order()  # the victim's share of the budget is for others now
                counts = self._share_budget(rows)
                rows, counts = rows[counts > 0], counts[counts > 0]

    def _preempt(self, group: RequestGroup) -> None:
        """Takes all rows and blocks from a group: all or nothing, since its sequences share and are resumed together."""
        running = [sequence for sequence in group.live if sequence.status is Status.RUNNING]
        num_blocks = sum(int(table[s.row]) for table in self.kv.num_blocks for s in running)
        transfer = None
        if self._is_whole(group) and self.policy.choose(group, num_blocks) is Preemption.SWAP:
            transfer = self.kv.swap_out(running)
        group.num_preemptions += 1
        self.counts.preemptions[Preemption.SWAP if transfer else Preemption.RECOMPUTE] += 1
        for sequence in running:
            lost = sequence.num_scheduled
            self._leave_row(sequence)
            if transfer:
                sequence.status = Status.SWAPPED
            else:
                sequence.status = Status.WAITING
                sequence.forget_computed()
                group.num_recomputed_tokens += lost
                self.counts.recomputed_tokens += lost
        if transfer:
            self._swaps.append(transfer)
            self._leaving[transfer.transfer_id] = group
            self.counts.swapped_blocks[Direction.OUT] += len(transfer.pairs)
        self._wait(group)

    def _leave_row(self, sequence: Sequence) -> None:
        row = sequence.row
        for fork in [f for f in self._forks if sequence in (f.source, f.target)]:
            self._forks.remove(fork)
            if fork.target is sequence:
                self._set_limit(fork.source)  # it need not stop there any more
            elif fork.target.status is Status.RUNNING:
                self._fork(fork)  # it takes what there is
        self._drafts.pop(row, None)
        if sequence in self._new_rows:
            self._new_rows.remove(sequence)
        for arriving in self._arriving.values():
            if sequence in arriving:
                arriving.remove(sequence)
        self._kept_rows.pop(sequence.group.request_id, None)
        self.kv.free(row, int(self.batch.last_step[row]))
        self.batch.remove(sequence)

    # -- forks that wait for their source ------------------------------------------------------------------------------
    def _is_whole(self, group: RequestGroup) -> bool:
        """None of its sequences waits for another one, or for its blocks to arrive."""
        waiting = [fork.target for fork in self._forks]
        waiting += [sequence for arriving in self._arriving.values() for sequence in arriving]
        return not any(sequence.group is group for sequence in waiting)

    def _run_forks(self) -> None:
        """Starts the sequences whose source has computed what they share with it."""
        for fork in list(self._forks):
            if fork.source.num_computed >= fork.num_tokens and fork.source not in [f.target for f in self._forks]:
                self._forks.remove(fork)
                self._fork(fork)

    def _fork(self, fork: _WaitingFork) -> None:
        batch, source, target = self.batch, fork.source.row, fork.target.row
        # not what steps in flight compute: none of them would tell the target when they have
        count = min(fork.num_tokens, int(batch.num_computed[source]))
        self.kv.fork(source, target, count)
        batch.num_scheduled[target] = batch.num_computed[target] = count
        for sequence in (fork.source, fork.target):
            self._set_limit(sequence)

    def _set_limit(self, sequence: Sequence) -> None:
        """A row stops where others are to fork from it, and waits at 0 for its own source or its blocks."""
        limit = min((fork.num_tokens for fork in self._forks if fork.source is sequence), default=UNLIMITED)
        if any(fork.target is sequence for fork in self._forks):
            limit = 0
        self.batch.limit[sequence.row] = limit

    # -- admission -----------------------------------------------------------------------------------------------------
    def _admit(self, budget: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Lets waiting groups in, strictly in order: who does not fit holds up those behind."""
        parts = []
        self.waiting_for = None
        while self._waiting:
            group = self._waiting[0][2]
            if group.is_finished:
                heapq.heappop(self._waiting)
                self._num_ended_waiting -= 1
                continue
            if self._is_in_flight(group):
                self.waiting_for = Shortage.IN_FLIGHT
                break
            verdict = self.admission.now(group, budget, self.batch.num_free_rows - sum(self._kept_rows.values()))
            if verdict.answer is not Admission.NOW:
                self.waiting_for = verdict.shortage
                break
            heapq.heappop(self._waiting)
            if verdict.hit is None:
                self._swap_in(group)
            else:
                part = self._start(group, verdict.hit, budget)
                budget -= int(part[2].sum())
                parts.append(part)
        return parts

    def _is_in_flight(self, group: RequestGroup) -> bool:
        """A step, or a transfer to the host, that works on a preempted group has not come back."""
        last_step = max(sequence.last_step for sequence in group.live)
        return last_step > self.kv.pool.completed_step or any(leaving is group for leaving in self._leaving.values())

    def _start(self, group: RequestGroup, hit: PrefixHit, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives a group without blocks its rows, and its first sequence some tokens; the others fork from that."""
        batch, kv = self.batch, self.kv
        live = group.live
        self._enter_rows(group)
        lead, row = live[0], live[0].row
        kv.attach(row, hit)
        batch.num_scheduled[row] = batch.num_computed[row] = hit.num_tokens
        lead.num_published = len(hit.blocks[0])
        if not group.was_admitted:
            group.was_admitted = True
            self.admitted.append(group)
            group.num_cached_tokens = hit.num_tokens
            kv.num_prefix_queries += lead.num_tokens
            kv.num_prefix_hits += hit.num_tokens
        for i, sequence in enumerate(live[1:], start=1):
            starts = [common_start(sequence, source) for source in live[:i]]
            best = int(np.argmax(starts))
            self._forks.append(_WaitingFork(live[best], sequence, starts[best]))
        for sequence in live:
            self._set_limit(sequence)
        rows_array = np.asarray([row], dtype=ROW_DTYPE)
        start = batch.num_scheduled[rows_array]
        todo = min(lead.num_tokens, int(batch.limit[row]), int(batch.max_total[row]) - 1) - hit.num_tokens
        count = np.asarray([max(min(todo, budget), 0)], dtype=ROW_DTYPE)
        kv.commit(kv.plan(rows_array, start, count), self._next_step - 1)
        return rows_array, start, count

    def _enter_row(self, sequence: Sequence) -> int:
        row = self.batch.add(sequence)
        self._new_rows.append(sequence)
        return row

    def _enter_rows(self, group: RequestGroup) -> None:
        for sequence in group.live:
            self._enter_row(sequence)
        if not group.is_forked:
            self._kept_rows[group.request_id] = group.params.n - 1

    def _swap_in(self, group: RequestGroup) -> None:
        live = group.live
        self._enter_rows(group)
        transfer = self.kv.swap_in(live)
        for sequence in live:
            self.batch.limit[sequence.row] = 0  # until its blocks are there
        self._arriving[transfer.transfer_id] = list(live)
        self._swaps.append(transfer)
        self.counts.swapped_blocks[Direction.IN] += len(transfer.pairs)

    # -- hand a step over ----------------------------------------------------------------------------------------------
    def _emit(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> SchedulerOutput | None:
        batch = self.batch
        if len(parts) == 1:
            rows, starts, counts = parts[0]
        else:
            rows, starts, counts = (np.concatenate(column).astype(ROW_DTYPE, copy=False) for column in zip(*parts))
            kept = counts > 0
            rows, starts, counts = rows[kept], starts[kept], counts[kept]
        is_polling = self.kv.has_transfers and not self._flights
        if not len(rows) and not self._swaps and not is_polling:
            return None
        step = self._next_step
        self._next_step += 1
        ends = starts + counts
        known = batch.num_tokens[rows] + batch.num_pending[rows]
        sampling = ends >= known  # the last known token's position, or a draft's, is among those computed
        sample_entries = np.flatnonzero(sampling).astype(ROW_DTYPE)
        sample_rows, sample_positions = rows[sampling], known[sampling]
        sample_index = sample_entries
        batch.num_scheduled[rows] = ends
        batch.last_step[rows] = step
        batch.num_pending[sample_rows] += 1
        all_rows, all_ends = rows, ends
        drafts = {}
        if self._drafts:
            drafts = self._take_drafts(rows)
        forked = self._fork_after_prefill(sample_rows, sample_entries, step) if self._kept_rows else []
        if forked:
            children, entries = (np.asarray(column, dtype=ROW_DTYPE) for column in zip(*forked))
            sample_index = np.concatenate([sample_index, len(rows) + np.arange(len(children), dtype=ROW_DTYPE)])
            sample_entries = np.concatenate([sample_entries, entries])
            sample_rows = np.concatenate([sample_rows, children])
            sample_positions = np.concatenate([sample_positions, ends[entries]])
            all_rows = np.concatenate([rows, children])
            all_ends = np.concatenate([ends, ends[entries]])
        new_rows = [self._describe(sequence) for sequence in self._new_rows]
        self._new_rows = []
        updates, copies = self.kv.drain(step)
        swaps, self._swaps = self._swaps, []
        output = SchedulerOutput(
            step_id=step,
            rows=rows,
            starts=starts,
            num_tokens=counts,
            sample_entries=sample_entries,
            sample_rows=sample_rows,
            sample_positions=sample_positions,
            new_rows=new_rows,
            table_updates=updates,
            swap_out=[transfer for transfer in swaps if transfer.direction is Direction.OUT],
            swap_in=[transfer for transfer in swaps if transfer.direction is Direction.IN],
            copies=copies,
            draft_token_ids=drafts,
        )
        epochs, sequences = batch.epoch[all_rows], batch.sequences[all_rows]
        self._flights.append(_Flight(output, all_rows, all_ends, epochs, sequences, sample_index))
        self.counts.steps += 1
        self.counts.tokens += int(counts.sum())
        return output

    def _take_drafts(self, rows: np.ndarray) -> dict[int, list[int]]:
        """Entry -> guesses of this step. Such a row waits for the result: how far it got decides where it goes on."""
        drafts = {}
        for entry, row in enumerate(rows.tolist()):
            guesses = self._drafts.pop(row, None)
            if guesses:
                drafts[entry] = guesses
                self.batch.limit[row] = 0
        return drafts

    def _fork_after_prefill(self, rows: np.ndarray, entries: np.ndarray, step: int) -> list[tuple[int, int]]:
        """(row, entry) of the sequences that begin where their prompt ends: they share its blocks, and its logits."""
        forked = []
        for row, entry in zip(rows.tolist(), entries.tolist()):
            sequence: Sequence = self.batch.sequences[row]
            group = sequence.group
            if group.is_forked:
                continue
            group.is_forked = True
            del self._kept_rows[group.request_id]
            for branch in range(1, group.params.n):
                child = sequence.fork(branch)
                target = self._enter_row(child)
                self.kv.fork(row, target, int(self.batch.num_scheduled[row]))
                self.batch.num_scheduled[target] = self.batch.num_scheduled[row]
                self.batch.num_computed[target] = self.batch.num_computed[row]
                self.batch.num_pending[target] = 1
                self.batch.last_step[target] = step
                child.num_published = sequence.num_published
                forked.append((target, entry))
        return forked

    def _describe(self, sequence: Sequence) -> NewRow:
        group = sequence.group
        return NewRow(
            row=sequence.row,
            token_ids=sequence.token_ids.copy(),
            num_prompt_tokens=len(group.prompt_token_ids),
            params=group.params,
            seed=group.seed,
            branch=sequence.branch,
            stop_token_ids=group.stop_token_ids,
            bad_words_token_ids=group.bad_words_token_ids,
        )

    # -- a step comes back ---------------------------------------------------------------------------------------------
    def update(self, result: StepOutput) -> StepTokens:
        """Takes the result of the oldest step in flight: appends tokens, ends sequences, publishes full blocks."""
        flight = self._flights.popleft()
        assert flight.output.step_id == result.step_id, "steps come back in order"
        batch, kv = self.batch, self.kv
        for transfer_id in result.finished_transfers:
            self._finish_transfer(transfer_id)
        kv.pool.complete_step(result.step_id)
        kv.host_pool.complete_step(result.step_id)
        given = StepTokens()
        here = batch.epoch[flight.rows] == flight.epochs
        rows = flight.rows[here]
        batch.num_computed[rows] = flight.ends[here]
        for i in np.flatnonzero(~here).tolist():
            sequence = flight.sequences[i]
            if sequence.status is Status.SWAPPED:
                sequence.set_computed(int(flight.ends[i]))
        for entry in result.prompt_logprobs:
            if not flight.sequences[entry].is_finished:  # another request may have its id by now
                given.prompt_entries.append((flight.sequences[entry], entry, int(flight.output.starts[entry])))

        token_ids = np.asarray(result.token_ids, dtype=np.int32)
        plain = here[flight.sample_index]
        plain[list(result.errors)] = False
        if flight.output.draft_token_ids:
            plain &= ~np.isin(flight.sample_index, list(flight.output.draft_token_ids))
        self._append(flight, token_ids, np.flatnonzero(plain), given)
        for sample in np.flatnonzero(~plain).tolist():
            self._append_special(flight, result, sample, given)
        # after the new tokens are known: a full block's name needs none of them, but its owner may have ended
        self._publish(flight, here)
        for sample, guesses in result.draft_token_ids.items():
            sequence = flight.sequences[flight.sample_index[sample]]
            if sequence.status is Status.RUNNING:
                self._drafts[sequence.row] = guesses
        for sequence in given.finished:
            self.finish(sequence, sequence.finish_reason or FinishReason.STOP, sequence.stop_reason)
        return given

    def _append(self, flight: _Flight, token_ids: np.ndarray, samples: np.ndarray, given: StepTokens) -> None:
        """One token each for sequences that are where they were: the way of nearly all tokens, in arrays."""
        if not len(samples):
            return
        batch = self.batch
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
        stopped = (batch.stop_ids[rows] == tokens[:, None]).any(axis=1) & (counts >= batch.min_total[rows])
        ended = stopped | (counts >= batch.max_total[rows]) | batch.has_many_stop_ids[rows]
        for i in np.flatnonzero(ended).tolist():
            self._check_end(sequences[i], given)

    def _append_special(self, flight: _Flight, result: StepOutput, sample: int, given: StepTokens) -> None:
        """A sample that failed, gave several tokens, or whose sequence has left its row."""
        index = int(flight.sample_index[sample])
        sequence: Sequence = flight.sequences[index]
        if sequence.is_finished:
            return
        if sample in result.errors:
            sequence.finish_reason, sequence.error = FinishReason.ERROR, result.errors[sample]
            given.finished.append(sequence)
            return
        had_drafts = index in flight.output.draft_token_ids
        tokens = list(result.accepted.get(sample, [int(result.token_ids[sample])]))
        if sequence.status is not Status.RUNNING:
            cut_behind_end(sequence, tokens)
            sequence.append_while_waiting(tokens)
            if sequence.status is Status.SWAPPED and had_drafts:
                sequence.rewind(sequence.num_tokens - 1)
        else:
            row, batch = sequence.row, self.batch
            cut_behind_end(sequence, tokens)
            count = int(batch.num_tokens[row])
            batch.token_ids[row, count : count + len(tokens)] = tokens
            batch.num_tokens[row] = count + len(tokens)
            batch.num_pending[row] -= 1
            if had_drafts:
                # guesses that were wrong have left keys and values behind: the next step writes over them
                batch.num_scheduled[row] = batch.num_computed[row] = count + len(tokens) - 1
                self._set_limit(sequence)
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
        batch, kv = self.batch, self.kv
        rows = flight.rows[here]
        size = kv.block_size
        computed = np.minimum(batch.num_computed[rows], batch.num_tokens[rows])
        # a row completed a block if a border lies in what it computed: a decoding one is looked at once a block
        starts = np.zeros(len(flight.rows), dtype=ROW_DTYPE)
        starts[: len(flight.output.starts)] = flight.output.starts
        filled = computed // size > starts[here] // size
        kv.publish(rows[filled], computed[filled])
        kv.free_behind_windows(rows, self._next_step - 1)

    def _finish_transfer(self, transfer_id: int) -> None:
        self.kv.finish_transfer(transfer_id)
        self._leaving.pop(transfer_id, None)
        arrived = []
        for sequence in self._arriving.pop(transfer_id, []):
            if sequence.status is Status.RUNNING:
                self._set_limit(sequence)
                arrived.append(sequence.row)
        rows = np.asarray(arrived, dtype=ROW_DTYPE)
        self.kv.publish(rows, np.minimum(self.batch.num_computed[rows], self.batch.num_tokens[rows]))
        self.kv.free_behind_windows(rows, self._next_step - 1)
