"""Which sequences compute how many tokens in the next step, and what follows from the tokens that come back.

There is no prefill phase and no decode phase: each running sequence has tokens that are known but not computed, and a step
lets it catch up by some of them, within one token budget. `schedule` plans a step, `update` takes its result; several steps
may lie between them. Does not know tensors, text, or clocks.

Order of service: (priority, arrival). Decoding sequences get their one token each first, then the running ones that catch up,
then the waiting ones. Who runs out of blocks takes them from the last in that order. Among clients, those catch up and are
let in first that were given least (`fairness`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from quire.core.admission import Admission, AdmissionControl, common_start
from quire.core.batch import Batch
from quire.core.beam_groups import BeamGroups
from quire.core.budget import TokenBudget
from quire.core.fairness import FairQueue, ServiceCounters
from quire.core.forks import WaitingForks
from quire.core.in_flight import StepsInFlight, StepTokens
from quire.core.journal import PreemptionNote, PrefixNote, Shortage
from quire.core.kv_cache import AllocationPlan, KVCacheManager, PrefixHit
from quire.core.preemption import (
    Cause,
    Preemption,
    PreemptionPolicy,
    Reason,
    ResumeGuard,
    SwapForks,
    decide,
)
from quire.core.rows import RowKeeper
from quire.core.sequence import FinishReason, RequestGroup, Sequence, Status
from quire.core.step import Direction, SchedulerOutput, StepOutput
from quire.core.transfers import Transfers
from quire.core.victims import facts_of, over_its_share

ROW_DTYPE = np.intp  # what indexes; messages to the worker are int32
_NOBODY = np.zeros(0, ROW_DTYPE), np.zeros(0, np.int32), np.zeros(0, np.int32)
ARRIVAL_GAP = 1 << 20  # numbers between two arrivals, for the groups that are forked from the first


@dataclass(slots=True)
class SchedulerCounts:
    """Running totals, for metrics."""

    steps: int = 0
    tokens: int = 0
    preemptions: Counter[tuple[Preemption, Cause, Reason]] = field(default_factory=Counter)
    recomputed_tokens: int = 0
    swapped_blocks: Counter[Direction] = field(default_factory=Counter)

    def preempted(self, way: Preemption) -> int:
        return sum(count for key, count in self.preemptions.items() if key[0] is way)


class Scheduler:
    """Holds every request from `add` to its end.

    `max_num_batched_tokens` is the budget of one step; `max_steps_in_flight` how many steps may be planned before the first
    of them has come back; `watermark` the share of blocks that an admission leaves free for those that run; `counters` what
    each client was given; `step_target_s` how long a step in which somebody decodes may take; `on_preempt` hears of each
    preemption.
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
        counters: ServiceCounters | None = None,
        step_target_s: float | None = None,
        on_preempt: Callable[[RequestGroup, PreemptionNote], None] | None = None,
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
        self.counters = counters or ServiceCounters()
        self._budget = TokenBudget(batch, self.counters, max_num_batched_tokens, step_target_s)
        self.admitted: list[RequestGroup] = []  # for the first time, since the caller last emptied this list
        self.waiting_for: Shortage | None = None  # why the first waiting group was not admitted in the last step
        self._on_preempt = on_preempt
        self._groups: dict[str, RequestGroup] = {}
        self._queue = FairQueue(self.counters)
        self._guard = ResumeGuard()
        self._rows = RowKeeper(batch, kv)
        self._forks = WaitingForks(batch, kv)
        self._beams = BeamGroups(self._rows, self._leave_row)
        self._transfers = Transfers(batch, kv, self.counts.swapped_blocks)
        self._in_flight = StepsInFlight(batch, kv, self._forks, self._beams, self._transfers, self._budget, self.policy)
        self._drafts = self._budget.drafts
        self._held_in_vain: RequestGroup | None = None  # tokens were held back for it, and it was not let in
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
        group.arrival = self._arrival_of(group)
        group.start_beams()
        group.client_number = self.counters.enter(group.client)
        group.journal.added_step = self._next_step
        self._groups[group.request_id] = group
        self._queue.push(group)

    def _arrival_of(self, group: RequestGroup) -> int:
        """A running number; one that was forked from a request comes right behind that."""
        if group.source is not None:
            root = group.root = group.source.group.root or group.source.group
            root.num_forks += 1
            if root.num_forks < ARRIVAL_GAP:
                return root.arrival + root.num_forks
        self._next_arrival += ARRIVAL_GAP
        return self._next_arrival

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
        """Ends one sequence, whatever it is doing (a stop string was found, say); of a beam search, all beams."""
        if sequence.is_finished:
            return
        group = sequence.group
        was_waiting = sequence.status is not Status.RUNNING
        for ended in group.live if group.beam is not None else [sequence]:
            if ended.status is Status.RUNNING:
                self._leave_row(ended)
            elif ended.status is Status.SWAPPED:
                self.kv.drop_host(ended)
            ended.status = Status.FINISHED
            ended.finish_reason, ended.stop_reason = reason, stop_reason
        if group.is_finished:
            del self._groups[group.request_id]
            if was_waiting:
                self._queue.note_finished(group)
            self.counters.leave(group.client)
            self._guard.forget(group.request_id)
        else:
            self._rows.keep_for(group)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return self.batch.num_running

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def step_target_s(self) -> float | None:
        return self._budget.step_target_s

    @step_target_s.setter
    def step_target_s(self, seconds: float) -> None:
        self._budget.step_target_s = seconds

    @property
    def num_steps(self) -> int:
        """Steps that have been planned."""
        return self._next_step

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # -- plan a step ---------------------------------------------------------------------------------------------------
    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if there is nothing to do before a step in flight comes back."""
        if len(self._in_flight) >= self.max_steps_in_flight:
            return None
        self._forks.run()
        next_in = self._budget.next_in = self._displace() if self.counters.num_clients > 1 else None
        parts, budget, was_short = [], self.max_num_batched_tokens, False
        if len(rows := self.batch.rows_in_order()):
            rows, counts, plan, was_short = self._make_room(rows, self._budget.share(rows))
            self._commit(plan)
            self._charge(rows, plan.starts, plan.starts + counts)
            parts = [(rows, plan.starts, counts)]
            budget = self._budget.total - int(np.add.reduce(counts))
        if not was_short:
            parts += self._admit(budget)
        self._held_in_vain = next_in[0] if next_in and self._queue.first() is next_in[0] else None
        return self._emit(parts)

    def _commit(self, plan: AllocationPlan) -> None:
        if not plan.total:
            return
        self.kv.commit(plan, self._next_step - 1)
        for copy in plan.copy:
            if copy.any():
                for sequence in self.batch.sequences[plan.rows[copy]]:
                    sequence.group.journal.num_copies += 1

    def _make_room(self, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, AllocationPlan, bool]:
        """Rows that compute in this step, with blocks for all of them: preempts the last groups as far as it must.

        The fourth is True if somebody had to wait or go, so that nobody new is let in.
        """
        pool, batch = self.kv.pool, self.batch
        was_short = False
        if np.count_nonzero(counts) < len(rows):
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
                assert coming or len(rows) > 1 or self._in_flight, "a group that was admitted alone does not fit"
                fitting = int(np.searchsorted(np.cumsum(plan.needed), pool.num_free, side="right"))
                keep = min(fitting, len(rows) - 1)
                for row in rows[keep:].tolist():
                    self._drafts.pop(row, None)
                rows, counts = rows[:keep], counts[:keep]
            else:
                self._preempt(victim)
                rows = batch.rows_in_order()  # the victim's share of the budget is for others now
                counts = self._budget.share(rows)
                rows, counts = rows[counts > 0], counts[counts > 0]

    def _preempt(self, group: RequestGroup, cause: Cause = Cause.OUT_OF_BLOCKS) -> None:
        """Takes all rows and blocks from a group: all or nothing, since its sequences share and are resumed together."""
        running = [sequence for sequence in group.live if sequence.status is Status.RUNNING]
        is_whole = not (self._forks.involve(group) or self._transfers.involve(group))
        facts = facts_of(self.kv, running, is_whole)
        choice = decide(self.policy, facts)
        transfer = self.kv.swap_out(running) if choice.preemption is Preemption.SWAP else None
        lost = 0
        for sequence in running:
            self._leave_row(sequence)
            if transfer:
                sequence.status = Status.SWAPPED
            else:
                sequence.status = Status.WAITING
                sequence.forget_computed()
        if transfer:
            self._transfers.out(group, transfer)
        else:
            lost = facts.num_recompute_tokens
            group.journal.num_recomputed_tokens += lost
            self.counts.recomputed_tokens += lost
        note = PreemptionNote(
            self._next_step, cause, choice.preemption, choice.reason, choice.explanation, facts.num_blocks, lost
        )
        group.journal.preemptions.append(note)
        self.counts.preemptions[choice.preemption, cause, choice.reason] += 1
        self._guard.note_preempted(group.request_id, self._next_step)
        self._queue.push(group)
        if self._on_preempt:
            self._on_preempt(group, note)

    def _leave_row(self, sequence: Sequence) -> None:
        self._forks.drop(sequence)
        self._transfers.drop(sequence)
        self._drafts.pop(sequence.row, None)
        self._rows.leave(sequence)

    # -- admission -----------------------------------------------------------------------------------------------------
    def _admit(self, budget: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Lets waiting groups in, strictly in order: who does not fit holds up those behind."""
        parts = []
        self.waiting_for = None
        while (group := self._queue.first()) is not None:
            if self._is_in_flight(group):
                self._wait(group, Shortage.IN_FLIGHT)
                break
            horizon = self._guard.horizon(group.request_id, is_alone=not self.batch.num_running)
            verdict = self.admission.now(group, budget, self._rows.num_free, horizon)
            if verdict.answer is not Admission.NOW:
                assert verdict.shortage is not None
                self._wait(group, verdict.shortage)
                break
            self._queue.pop(group)
            self._guard.note_resumed(group.request_id, self._next_step)
            if verdict.hit is None:
                self._rows.enter_group(group)
                self._transfers.back(group)
            else:
                part = self._start(group, verdict.hit, budget)
                if count := int(part[2][0]):
                    budget -= count
                    parts.append(part)
        return parts

    def _displace(self) -> tuple[RequestGroup, int] | None:
        """The first in the queue, if it is let in in this step, and the tokens that it is to compute.

        Where it finds no room, groups of clients that have more than their share make it. A share is of rows or blocks,
        whichever is missing, by weight; and they were given no less than who waits. After it the client that waits has no
        more than the other keeps, so two of them cannot displace each other in turn.
        """
        while (group := self._queue.first()) is not None and not self._is_in_flight(group):
            horizon = self._guard.horizon(group.request_id, is_alone=not self.batch.num_running)
            verdict = self.admission.now(group, self.max_num_batched_tokens, self._rows.num_free, horizon)
            if verdict.shortage is Shortage.ROWS:
                usage = np.ones(len(self.batch.rows_in_order()), dtype=np.int64)
                needed = group.num_rows
            elif verdict.shortage is Shortage.BLOCKS and not self.kv.pool.num_pending + self.kv.num_moving:
                usage = sum(table[self.batch.rows_in_order()] for table in self.kv.num_blocks)
                needed = sum(-(-sequence.num_tokens // self.kv.block_size) for sequence in group.live)
            else:
                if verdict.hit is None or group is self._held_in_vain:
                    return None
                return group, group.live[0].num_tokens - verdict.hit.num_tokens
            victim = over_its_share(self.batch, self.counters, group, usage, needed)
            if victim is None:
                return None
            self._preempt(victim, Cause.FAIRNESS)
        return None

    def _wait(self, group: RequestGroup, shortage: Shortage) -> None:
        self.waiting_for = shortage
        group.journal.waited[shortage] += 1

    def _is_in_flight(self, group: RequestGroup) -> bool:
        """A step, or a transfer to the host, that works on a preempted group has not come back."""
        last_step = max(sequence.last_step for sequence in group.live)
        return last_step > self.kv.pool.completed_step or self._transfers.is_leaving(group)

    def _start(self, group: RequestGroup, hit: PrefixHit, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives a group without blocks its rows, and its first sequence some tokens; the others fork from that."""
        batch, kv = self.batch, self.kv
        live = group.live
        self._rows.enter_group(group)
        lead, row = live[0], live[0].row
        kv.attach(row, hit)
        batch.num_scheduled[row] = batch.num_computed[row] = hit.num_tokens
        lead.num_published = min(hit.num_tokens // kv.block_size, len(hit.blocks[0]))
        group.journal.num_copies += hit.partial is not None
        if not group.was_admitted:
            group.journal.admitted_step = self._next_step
            group.journal.prefix = self._note_prefix(lead, hit)
            self.admitted.append(group)
            group.num_cached_tokens = hit.num_tokens
            kv.num_prefix_queries += lead.num_tokens
            kv.num_prefix_hits += hit.num_tokens
        group.source = None
        for i, sequence in enumerate(live[1:], start=1):
            starts = [common_start(sequence, source) for source in live[:i]]
            best = int(np.argmax(starts))
            self._forks.add(live[best], sequence, starts[best])
        for sequence in live:
            self._forks.set_limit(sequence)
        rows_array = np.asarray([row], dtype=ROW_DTYPE)
        start = batch.num_scheduled[rows_array]
        todo = min(lead.num_tokens, int(batch.limit[row]), int(batch.max_total[row]) - 1) - hit.num_tokens
        count = np.asarray([max(min(todo, budget), 0)], dtype=np.int32)
        self._commit(kv.plan(rows_array, start, count))
        self._charge(rows_array, start, start + count)  # at once: who is next depends on it
        return rows_array, start, count

    def _note_prefix(self, lead: Sequence, hit: PrefixHit) -> PrefixNote:
        num_tokens, found = lead.num_tokens, hit.num_tokens
        return PrefixNote(
            num_prompt_tokens=num_tokens,
            num_tokens=found,
            blocks=list(hit.blocks[0]),
            from_fork=hit.is_fork,
            token=int(lead.token_ids[found]) if found < num_tokens else None,
            cached_tokens=self.kv.cached_after(lead, found) if self.kv.enable_prefix_caching else [],
        )

    # -- hand a step over ----------------------------------------------------------------------------------------------
    def _emit(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> SchedulerOutput | None:
        batch = self.batch
        if len(parts) < 2:
            rows, starts, counts = parts[0] if parts else _NOBODY
        else:
            rows, starts, counts = (np.concatenate(column) for column in zip(*parts))
        is_polling = self.kv.has_transfers and not self._in_flight
        if not len(rows) and not self._transfers.are_ordered and not is_polling:
            return None
        step = self._next_step
        self._next_step += 1
        ends = starts + counts
        known = batch.num_tokens[rows] + batch.num_pending[rows]
        sent_rows = rows.astype(np.int32)
        sampling = ends >= known  # the last known token's position, or a draft's, is among those computed
        sample_index = sampling.nonzero()[0]
        if len(sample_index) == len(rows):
            sampled, sample_rows, sample_positions = rows, sent_rows, known
        else:
            sampled, sample_rows, sample_positions = rows[sampling], sent_rows[sampling], known[sampling]
        sample_entries = sample_index.astype(np.int32)
        batch.num_scheduled[rows] = ends
        batch.last_step[rows] = step
        is_beam = batch.is_beam[sampled]
        batch.num_pending[sampled] += 1 - is_beam  # a beam's next token is not drawn in the step
        all_rows, all_ends = rows, ends
        drafts = {}
        if self._drafts:
            drafts = self._take_drafts(rows)
        forked = self._fork_after_prefill(sampled, sample_entries) if self._rows.num_kept else []
        if forked:
            children, entries = (np.asarray(column, dtype=ROW_DTYPE) for column in zip(*forked))
            sample_index = np.concatenate([sample_index, len(rows) + np.arange(len(children))])
            sample_entries = np.concatenate([sample_entries, entries.astype(np.int32)])
            sample_rows = np.concatenate([sample_rows, children.astype(np.int32)])
            is_beam = np.concatenate([is_beam, batch.is_beam[children]])
            sample_positions = np.concatenate([sample_positions, ends[entries]])
            all_rows = np.concatenate([rows, children])
            all_ends = np.concatenate([ends, ends[entries]])
        new_rows, token_updates = self._rows.drain()
        updates, copies = self.kv.drain(step)
        swap_out, swap_in = self._transfers.drain()
        output = SchedulerOutput(
            step_id=step,
            rows=sent_rows,
            starts=starts,
            num_tokens=counts,
            sample_entries=sample_entries,
            sample_rows=sample_rows,
            sample_positions=sample_positions,
            new_rows=new_rows,
            token_updates=token_updates,
            table_updates=updates,
            swap_out=swap_out,
            swap_in=swap_in,
            copies=copies,
            draft_token_ids=drafts,
        )
        self._in_flight.add(output, all_rows, all_ends, sample_index, is_beam > 0)
        self.counts.steps += 1
        self.counts.tokens += int(np.add.reduce(counts))
        return output

    def _charge(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """Clients pay for each token that is computed for them, once: not again after a preemption."""
        batch = self.batch
        before = np.maximum(batch.num_charged[rows], starts)
        written = (ends - starts == 1) & (starts >= batch.num_prompt[rows])
        self.counters.charge_rows(batch.client[rows], np.maximum(ends - before, 0), written)
        batch.num_charged[rows] = np.maximum(before, ends)

    def _take_drafts(self, rows: np.ndarray) -> dict[int, list[int]]:
        """Entry -> guesses of this step. Such a row waits for the result: how far it got decides where it goes on."""
        drafts = {}
        for entry, row in enumerate(rows.tolist()):
            guesses = self._drafts.pop(row, None)
            if guesses:
                drafts[entry] = guesses
                self.batch.limit[row] = 0
        return drafts

    def _fork_after_prefill(self, rows: np.ndarray, entries: np.ndarray) -> list[tuple[int, int]]:
        """(row, entry) of the sequences that begin where their prompt ends: they share its blocks, and its logits."""
        forked = []
        for row, entry in zip(rows.tolist(), entries.tolist()):
            sequence: Sequence = self.batch.sequences[row]
            group = sequence.group
            if group.is_forked:
                continue
            group.is_forked = True
            for _ in range(1, group.params.num_sequences):
                child = self._rows.fork(sequence)
                self.batch.num_pending[child.row] = 1
                forked.append((child.row, entry))
            self._rows.keep_for(group)
        return forked

    # -- a step comes back ---------------------------------------------------------------------------------------------
    def update(self, result: StepOutput) -> StepTokens:
        """Takes the result of the oldest step in flight: appends tokens, ends sequences, publishes full blocks."""
        given = self._in_flight.complete(result)
        for sequence in given.finished:
            self.finish(sequence, sequence.finish_reason or FinishReason.STOP, sequence.stop_reason)
        return given
