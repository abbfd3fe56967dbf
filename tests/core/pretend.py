"""A worker whose KV memory holds token ids, and a driver that puts the core under random load with it.

Any mistake in a block table then reads back as a wrong token: every slot that a query may see is compared with the token
that ought to be there, and every answer with the one that the same rule gives for the sequence alone. Steps run late, in
order; transfers between device and host happen as late as they may, so that a block that is handed out too early is found.

Run by itself for a long trial:  python tests/core/pretend.py --steps 1000000 --seed 7
"""

from __future__ import annotations

import argparse
import random
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from quire.core.accounting import measure
from quire.core.batch import Batch
from quire.core.beam_groups import end_of
from quire.core.cache_group import CacheGroup
from quire.core.fairness import ServiceCounters
from quire.core.kv_cache import KVCacheManager
from quire.core.preemption import Always, Cause, CheaperOf, Choice, Preemption, SwapForks, VictimFacts
from quire.core.scheduler import Scheduler
from quire.core.sequence import FinishReason, RequestGroup, Sequence, Status
from quire.core.step import Candidates, Direction, NewRow, SchedulerOutput, StepOutput, Transfer
from quire.errors import RequestError
from quire.sampling_params import SamplingParams

EMPTY = -1
VOCAB = 5  # few tokens, so that prompts and answers meet by chance
EOS = 0


def next_token(seed: int, branch: int, position: int, visible: list[np.ndarray]) -> int:
    """The pretend model and sampler: what follows depends on all tokens that some cache group sees, and the draw's name."""
    digest = zlib.crc32(repr((seed, branch, position)).encode())
    for tokens in visible:
        digest = zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), digest)
    return (digest >> 7) % VOCAB


def beam_candidates(seed: int, visible: list[np.ndarray], count: int) -> Candidates:
    """What the pretend model says of a beam: a score for each token, seldom equal ones."""
    digest = zlib.crc32(repr(seed).encode())
    for tokens in visible:
        digest = zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), digest)
    scores = [-(zlib.crc32(bytes([token]), digest) % 4093) / 1024 for token in range(VOCAB)]
    best = sorted(range(VOCAB), key=lambda token: -scores[token])[:count]
    return Candidates(np.asarray(best), np.asarray([scores[token] for token in best], dtype=np.float32))


def first_visible(window: int | None, position: int) -> int:
    return 0 if window is None else max(0, position - window + 1)


def assert_int32(step: SchedulerOutput) -> None:
    """Whatever the scheduler indexes with: the arrays of its messages are int32."""
    sent = [step.rows, step.starts, step.num_tokens, step.sample_entries, step.sample_rows, step.sample_positions]
    sent.append(step.copies)
    sent += [array for updates in step.table_updates for u in updates for array in (u.rows, u.columns, u.blocks)]
    sent += [transfer.pairs for transfer in (*step.swap_out, *step.swap_in)]
    if (decided := step.token_updates) is not None:
        sent += [decided.rows, decided.positions, decided.token_ids]
    assert all(array.dtype == np.int32 for array in sent), [array.dtype for array in sent]


class PretendWorker:
    """Executes steps on `memory[group]`-free KV: one array of slots for all groups, since they share one pool."""

    def __init__(
        self, groups: tuple[CacheGroup, ...], num_blocks: int, num_host: int, block_size: int, rows: int, length: int
    ) -> None:
        self.windows = [group.window for group in groups]
        self.size = block_size
        # a slot holds position * VOCAB + token, so that the right token at the wrong place is found too
        self.memory = np.full((num_blocks + 1, block_size), EMPTY, dtype=np.int64)
        self.host = np.full((num_host + 1, block_size), EMPTY, dtype=np.int64)
        self.tables = [np.zeros((rows, -(-length // block_size)), dtype=np.int32) for _ in groups]
        self.tokens = np.full((rows, length + 1), EMPTY, dtype=np.int64)
        self.tenant: dict[int, NewRow] = {}
        self.open_transfers: list[Transfer] = []
        self.transfer_rate = 0.5  # chance that a transfer is done in a step
        self.num_slots_read = 0

    def run(self, step: SchedulerOutput, rng: random.Random, draft: float, error: float) -> StepOutput:
        assert_int32(step)
        for new in step.new_rows:
            self.tenant[new.row] = new
            self.tokens[new.row] = EMPTY
            self.tokens[new.row, : len(new.token_ids)] = new.token_ids
        if step.token_updates is not None:
            updates = step.token_updates
            self.tokens[updates.rows, updates.positions] = updates.token_ids
        for table, updates in zip(self.tables, step.table_updates):
            for update in updates:
                table[update.rows, update.columns] = update.blocks
        for transfer in step.swap_in:
            self.memory[transfer.pairs[:, 1]] = EMPTY  # not there before the transfer is done
        self.open_transfers += [*step.swap_out, *step.swap_in]
        self.memory[step.copies[:, 1]] = self.memory[step.copies[:, 0]]
        for entry, (row, start, count) in enumerate(zip(step.rows, step.starts, step.num_tokens)):
            guesses = step.draft_token_ids.get(entry, [])
            if guesses:
                self.tokens[row, start + 1 : start + 1 + len(guesses)] = guesses
            self._write(row, start, start + count)
        for row, start, count in zip(step.rows, step.starts, step.num_tokens):
            self._read(row, start, start + count)
        result = StepOutput(step.step_id, np.zeros(len(step.sample_rows), dtype=np.int32))
        result.elapsed_s, result.transfer_s = rng.random(), rng.random() / 4
        for sample, (entry, row, position) in enumerate(
            zip(step.sample_entries, step.sample_rows, step.sample_positions)
        ):
            if rng.random() < error:
                result.errors[sample] = "planted"
            if wanted := self.tenant[int(row)].num_candidates:
                visible = self._visible(int(step.rows[entry]), int(position))
                result.candidates[sample] = beam_candidates(self.tenant[int(row)].seed, visible, wanted)
                continue
            guesses = step.draft_token_ids.get(int(entry), [])
            tokens = self._draw(int(step.rows[entry]), int(row), int(position), guesses)
            self.tokens[row, position : position + len(tokens)] = tokens
            result.token_ids[sample] = tokens[0]
            if guesses:
                result.accepted[sample] = tokens
            if rng.random() < draft:
                result.draft_token_ids[sample] = self._guess(int(row), int(position) + len(tokens), rng)
        self._finish_transfers(result, rng)
        return result

    def _slots(self, table: np.ndarray, row: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, end)
        return table[row, positions // self.size], positions % self.size

    def _write(self, row: int, start: int, end: int) -> None:
        assert (self.tokens[row, start:end] != EMPTY).all(), "an input token is not known"
        for table in self.tables:
            blocks, offsets = self._slots(table, row, start, end)
            assert (blocks != 0).all(), "a token is written into the null block"
            self.memory[blocks, offsets] = np.arange(start, end) * VOCAB + self.tokens[row, start:end]

    def _read(self, row: int, start: int, end: int) -> None:
        """Every slot that one of the queries start .. end - 1 may see holds the right token of the right position."""
        for table, window in zip(self.tables, self.windows):
            first = first_visible(window, start)
            blocks, offsets = self._slots(table, row, first, end)
            wanted = np.arange(first, end) * VOCAB + self.tokens[row, first:end]
            found = self.memory[blocks, offsets]
            self.num_slots_read += len(found)
            assert (found == wanted).all(), f"row {row}: read {found} for {wanted}"

    def _draw(self, source: int, row: int, position: int, guesses: list[int]) -> list[int]:
        """`row` draws; the context is read through the table of `source`, whose logits it takes."""
        tenant, tokens = self.tenant[row], []
        while True:
            visible = self._visible(source, position)
            tokens.append(next_token(tenant.seed, tenant.branch, position, visible))
            if len(tokens) > len(guesses) or guesses[len(tokens) - 1] != tokens[-1]:
                return tokens
            position += 1

    def _visible(self, row: int, position: int) -> list[np.ndarray]:
        """The tokens that each cache group sees when the one at `position` is chosen, as they stand in memory."""
        visible = []
        for table, window in zip(self.tables, self.windows):
            blocks, offsets = self._slots(table, row, first_visible(window, position - 1), position)
            visible.append(self.memory[blocks, offsets] % VOCAB)
        return visible

    def _guess(self, row: int, position: int, rng: random.Random) -> list[int]:
        """Guesses that are right more often than by chance."""
        tenant = self.tenant[row]
        known = self.tokens[row, :position].copy()
        guesses = []
        for _ in range(rng.randint(1, 3)):
            visible = [known[first_visible(window, len(known) - 1) :] for window in self.windows]
            right = next_token(tenant.seed, tenant.branch, len(known), visible)
            guesses.append(right if rng.random() < 0.6 else rng.randrange(VOCAB))
            known = np.append(known, guesses[-1])
        return guesses

    def _finish_transfers(self, result: StepOutput, rng: random.Random) -> None:
        for transfer in list(self.open_transfers):
            if rng.random() < self.transfer_rate:
                source, target = (
                    (self.memory, self.host) if transfer.direction is Direction.OUT else (self.host, self.memory)
                )
                target[transfer.pairs[:, 1]] = source[transfer.pairs[:, 0]]
                self.open_transfers.remove(transfer)
                result.finished_transfers.append(transfer.transfer_id)


@dataclass
class Trial:
    """One random engine: sizes, policies, and the load put on it."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.size = rng.choice([1, 2, 3, 4, 4, 8, 16])
        self.max_len = rng.randint(12, 90)
        windows = rng.choice([[None], [None], [None], [rng.randint(1, 20)], [None, rng.randint(1, 20)], [None, 5, 9]])
        self.groups = tuple(CacheGroup((i,), window, 1, 8, "float32") for i, window in enumerate(windows))
        budget = rng.choice([1, 2, 5, 8, 16, 64])
        one = sum(group.max_blocks(self.max_len, self.size, budget) for group in self.groups)
        num_blocks = one + int(one * rng.choice([0, 0.2, 0.5, 1, 3]) * rng.random())
        num_host = rng.choice([0, num_blocks // 3, num_blocks, num_blocks])
        rows = rng.choice([1, 4, 8, 12])
        self.batch = Batch(rows, self.max_len)
        self.cached = rng.random() < 0.7
        self.kv = KVCacheManager(
            self.batch,
            self.groups,
            num_blocks,
            self.size,
            num_host_blocks=num_host,
            enable_prefix_caching=self.cached,
            root=("pretend", "token ids"),
        )
        policy = rng.choice(
            [
                *(Always(Preemption.RECOMPUTE), Always(Preemption.SWAP), Always(Preemption.SWAP)),
                *(SwapForks(), _Random(rng), CheaperOf(64, bus_bytes_per_s=2000.0, prefill_tokens_per_s=50.0)),
            ]
        )
        self.scheduler = Scheduler(
            self.batch,
            self.kv,
            max_num_batched_tokens=budget,
            max_model_len=self.max_len,
            max_steps_in_flight=rng.randint(1, 4),
            policy=policy,
            watermark=rng.choice([0.0, 0.01, 0.1]),
            counters=ServiceCounters({"dear": 3.0, "cheap": 0.5}),
            step_target_s=rng.choice([None, 0.3]),
        )
        self.worker = PretendWorker(self.groups, num_blocks, num_host, self.size, rows, self.max_len)
        self.worker.transfer_rate = rng.choice([0.1, 0.5, 1.0])
        self.draft = rng.choice([0.0, 0.0, 0.4])
        self.error = rng.choice([0.0, 0.0, 0.002])
        self.abort = rng.choice([0.0, 0.05])
        self.load = rng.choice([3, 8, 16])
        self.beams = rng.choice([0.0, 0.2, 0.6])
        self.fork = rng.choice([0.0, 0.0, 0.1, 0.3])
        self.clients = rng.choice([[""], ["", "dear", "cheap"], ["flood"] * 8 + ["dear", ""]])
        self.stems = [[rng.randrange(1, VOCAB) for _ in range(self.max_len)] for _ in range(3)]
        self.flights: deque[tuple[SchedulerOutput, set[int]]] = deque()
        self.alive: list[RequestGroup] = []
        self.num_added = 0
        self.idle_steps = 0
        self._watch_charges()

    def _watch_charges(self) -> None:
        """A client pays for each token of a sequence once, however often it is computed."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        charge, charge_rows = scheduler._charge, counters.charge_rows
        paid: dict[Sequence, int] = {}  # tokens from the start that are paid for
        amounts: list[int] = []

        def watched_rows(clients: np.ndarray, counts: np.ndarray, written: np.ndarray) -> None:
            amounts[:] = counts.tolist()
            charge_rows(clients, counts, written)

        def watched(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
            charge(rows, starts, ends)
            for row, start, end, amount in zip(rows.tolist(), starts.tolist(), ends.tolist(), amounts, strict=True):
                before = max(paid.get(self.batch.sequences[row], start), start)
                assert amount == max(end - before, 0), f"charged {amount} for {start} to {end}, {before} were paid for"
                paid[self.batch.sequences[row]] = max(before, end)

        fork = scheduler._rows.fork

        def watched_fork(parent: Sequence) -> Sequence:
            child = fork(parent)
            if parent in paid:
                paid[child] = paid[parent]
            return child

        scheduler._charge, counters.charge_rows = watched, watched_rows  # type: ignore[method-assign]
        scheduler._rows.fork = watched_fork  # type: ignore[method-assign]

    # -- load --------------------------------------------------------------------------------------------------------
    def add_request(self) -> None:
        rng = self.rng
        stem = rng.choice(self.stems)
        prompt = stem[: rng.randint(1, rng.randint(1, self.max_len - 2))]
        if rng.random() < 0.5:
            prompt = prompt[: max(1, len(prompt) - rng.randint(1, 6))] + [
                rng.randrange(VOCAB) for _ in range(rng.randint(0, 6))
            ]
        self._add(prompt[: self.max_len - 1])

    def fork_running(self) -> None:
        """Forks a sequence in the middle of its answer, or of its prompt; the branch may go on with other text."""
        rng = self.rng
        group = rng.choice(self.alive)
        if group.beam is not None:
            return
        source = rng.choice(group.live)
        for _ in range(rng.choice([1, 1, 2, 3])):
            prompt = source.token_ids.tolist() + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 1, 5]))]
            if len(prompt) < self.max_len:
                self._add(prompt, source)
                self.counts["forks of running"] += 1

    def _add(self, prompt: list[int], source: Sequence | None = None) -> None:
        rng = self.rng
        width = rng.choice([1, 2, 3, 4]) if rng.random() < self.beams else None
        search = (
            {}
            if width is None
            else {
                "use_beam_search": True,
                "best_of": width,
                "length_penalty": rng.choice([1.0, 0.0, -1.0, 2.0]),
                "early_stopping": rng.choice([True, False, "never"]),
            }
        )
        params = SamplingParams(
            n=rng.randint(1, width) if width else rng.choice([1, 1, 1, 2, 3, 4]),
            **search,
            max_tokens=rng.choice([1, 4, 12, 25, None]),
            min_tokens=0 if rng.random() < 0.8 else 1,
            stop_token_ids=rng.choice([None, None, None, None, [3], list(range(2, 14))]),
            ignore_eos=rng.random() < 0.85,
            prompt_logprobs=0 if rng.random() < 0.1 and not width else None,
        )
        group = RequestGroup(
            request_id=str(self.num_added),
            prompt_token_ids=np.asarray(prompt, dtype=np.int32),
            params=params,
            seed=rng.randrange(3),  # equal seeds make equal answers, which the prefix cache then shares
            priority=rng.choice([0, 0, 0, 1, -1]),
            stop_token_ids=() if params.ignore_eos else (EOS,),
            cache_salt=source.group.cache_salt if source else rng.choice([None, None, "salt"]),
            client=source.group.client if source else rng.choice(self.clients),
            source=source,
        )
        self.num_added += 1
        try:
            self.scheduler.add(group)
        except RequestError:
            self.counts["refused"] += 1
            return
        self.alive.append(group)

    # -- one iteration -------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Plans, and takes back, some steps; False if there was nothing to do."""
        rng = self.rng
        if len(self.alive) < self.load and rng.random() < 0.7:
            self.add_request()
        if self.alive and rng.random() < self.abort:
            self.disturb()
        if self.alive and rng.random() < self.fork and len(self.alive) < 2 * self.load:
            self.fork_running()
        output = self._schedule()
        did = output is not None
        # a step comes back when no other can be planned, or sometimes before
        must = output is None
        while self.flights and (must or rng.random() < 0.5):
            self._complete()
            must = False
            did = True
        self._check()
        return did

    def disturb(self) -> None:
        group = self.rng.choice(self.alive)
        if self.rng.random() < 0.5:
            self.scheduler.abort(group.request_id)
            self.counts["aborts"] += 1
        else:
            self.scheduler.finish(self.rng.choice(group.live or group.sequences), FinishReason.STOP, "a stop string")
            self.counts["stops"] += 1
        self._judge_finished()

    def _schedule(self) -> SchedulerOutput | None:
        taken: list[int] = []
        pool = self.kv.pool
        allocate = pool.allocate

        def watched(count: int) -> list[int]:
            blocks = allocate(count)
            taken.extend(blocks)
            return blocks

        pool.allocate = watched  # type: ignore[method-assign]
        try:
            output = self.scheduler.schedule()
        finally:
            pool.allocate = allocate  # type: ignore[method-assign]
        touched = set().union(*(known for _, known in self.flights)) if self.flights else set()
        assert not touched & set(taken), "a block was handed out that a step in flight may touch"
        if output is None:
            assert not taken
            return None
        assert output.total_num_tokens <= self.scheduler.max_num_batched_tokens, "over the token budget"
        sources, targets = output.copies[:, 0].tolist(), output.copies[:, 1].tolist()
        assert not set(sources) & set(targets), "a block is source and target of copies in one launch"
        assert len(set(targets)) == len(targets), "two copies into one block"
        known = set(sources) | set(targets)
        children = Counter(output.sample_entries.tolist())  # they share what their entry writes, from the next step on
        for entry, (row, start, count) in enumerate(zip(output.rows, output.starts, output.num_tokens)):
            holders = max(children[entry], 1)
            for g, table in enumerate(self.kv.tables):
                known.update(self.kv.blocks_of(g, row))
                for column in range(start // self.size, (start + count - 1) // self.size + 1):
                    block = table[row, column]
                    assert pool.ref_count[block] == holders, "a shared block is written"
                    assert not pool.published[block], "a published block is written"
        self.flights.append((output, known))
        self.counts["copies"] += len(targets)
        self.counts["steps"] += 1
        self.counts["in flight"] = max(self.counts["in flight"], len(self.flights))
        return output

    def _complete(self) -> None:
        output, _ = self.flights.popleft()
        result = self.worker.run(output, self.rng, self.draft, self.error)
        given = self.scheduler.update(result)
        self.counts["tokens"] += len(given.token_ids)
        self.counts["several tokens"] += len(result.accepted)
        self._judge_finished()
        moved = bool(given.token_ids or given.finished or result.finished_transfers or output.total_num_tokens)
        self.idle_steps = 0 if moved else self.idle_steps + 1
        assert self.idle_steps < 200, "no progress"

    # -- what must hold ------------------------------------------------------------------------------------------------
    def _check(self) -> None:
        self.kv.check()
        usage = measure(self.kv)
        usage.check()
        assert usage.total == self.kv.pool.num_blocks * self.size
        batch = self.batch
        rows = batch.rows_in_order()
        assert (batch.num_computed[rows] <= batch.num_scheduled[rows]).all()
        assert (batch.num_scheduled[rows] <= batch.num_tokens[rows] + batch.num_pending[rows] + 3).all()
        assert len(rows) + batch.num_free_rows == batch.max_num_seqs
        self.counts["waste"] += usage.waste
        if usage.shared:
            self.counts["shared"] += 1

    def _judge_finished(self) -> None:
        for group in [group for group in self.alive if group.is_finished]:
            self.alive.remove(group)
            self.counts["groups"] += 1
            self.counts["prefix hits"] += group.num_cached_tokens > 0
            self.counts["partial hits"] += group.num_cached_tokens % self.size > 0
            self.counts["preempted groups"] += group.num_preemptions > 0
            self.counts["forks"] += len(group.sequences) - 1
            self.counts["displaced"] += any(note.cause is Cause.FAIRNESS for note in group.journal.preemptions)
            prefix = group.journal.prefix
            self.counts["fork hits"] += prefix is not None and prefix.from_fork
            if group.beam is not None:
                self._judge_beams(group)
                continue
            for sequence in group.sequences:
                self._judge(sequence)

    def _judge_beams(self, group: RequestGroup) -> None:
        """The hypotheses, and their scores, are those of a search over the pretend model alone."""
        search = group.beam
        assert search is not None
        if not search.is_done:
            self.counts["beam searches cut"] += 1
            return
        alone = RequestGroup("alone", group.prompt_token_ids, group.params, group.seed, max_tokens=group.max_tokens)
        alone.stop_token_ids = group.stop_token_ids
        alone.start_beams()
        assert alone.beam is not None
        while not alone.beam.is_done:
            found = []
            for beam in alone.beam.live:
                tokens = [*group.prompt_token_ids.tolist(), *beam.token_ids()]
                visible = [np.asarray(tokens[first_visible(spec.window, len(tokens) - 1) :]) for spec in self.groups]
                found.append(beam_candidates(group.seed, visible, alone.beam.num_ranked))
            alone.beam.advance(found, lambda beam, token: end_of(alone, beam, token))
        for mine, right in zip(search.finished, alone.beam.finished, strict=True):
            assert mine.beam.token_ids() == right.beam.token_ids(), "a wrong beam"
            assert (mine.score, mine.reason, mine.stop_reason) == (right.score, right.reason, right.stop_reason)
        self.counts["beam searches"] += 1
        self.counts["preempted beam searches"] += group.num_preemptions > 0

    def _judge(self, sequence: Sequence) -> None:
        """An answer equals what the pretend model says of the sequence alone, and ends where it must."""
        group, params = sequence.group, sequence.group.params
        tokens = list(group.prompt_token_ids)
        stops = {*group.stop_token_ids, *(params.stop_token_ids or ())}
        found = sequence.output_token_ids.tolist()
        for i, token in enumerate(found):
            visible = [np.asarray(tokens[first_visible(spec.window, len(tokens) - 1) :]) for spec in self.groups]
            assert token == next_token(group.seed, sequence.branch, len(tokens), visible), "a wrong token"
            tokens.append(token)
            ends = (token in stops and i + 1 >= params.min_tokens) or i + 1 == group.max_tokens
            assert not ends or i + 1 == len(found), "it went on after its end"
        if sequence.finish_reason is FinishReason.LENGTH:
            assert len(found) == group.max_tokens
        elif sequence.finish_reason is FinishReason.STOP and sequence.stop_reason != "a stop string":
            assert found[-1] in stops
            assert sequence.stop_reason == (None if found[-1] in group.stop_token_ids else found[-1])

    def run(self, steps: int) -> Counter[str]:
        for _ in range(steps):
            self.step()
        self.load = self.abort = self.fork = 0
        for _ in range(100_000):
            if not self.step():
                break
        assert not self.alive, "requests were forgotten"
        assert not self.scheduler.has_unfinished
        pool = self.kv.pool
        assert pool.num_held == pool.num_pending == 0, "blocks leaked"
        assert pool.num_free == pool.num_blocks
        assert self.kv.host_pool.num_free == self.kv.host_pool.num_blocks, "host blocks leaked"
        assert self.batch.num_running == 0
        for block in pool.cache.blocks():
            entry = pool.cache._entry_of[block]
            held = self.worker.memory[block] % VOCAB
            assert held.astype("<i4").tobytes() == entry[2], "a published block holds something else"
        scheduler = self.scheduler.counts
        self.counts["recomputed"] = scheduler.preempted(Preemption.RECOMPUTE)
        self.counts["swapped"] = scheduler.preempted(Preemption.SWAP)
        self.counts["slots read"] = self.worker.num_slots_read
        return self.counts


class _Random(Always):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(Preemption.SWAP)
        self._rng = rng

    def decide(self, victim: VictimFacts) -> Choice:
        self.preemption = self._rng.choice(list(Preemption))
        return super().decide(victim)


def fuzz(num_steps: int, seed: int = 0, steps_per_trial: int = 60) -> Counter[str]:
    """Runs trials, each with a seed of its own, until `num_steps` steps have been planned."""
    counts: Counter[str] = Counter()
    trial = seed * 1_000_003
    while counts["steps"] < num_steps:
        try:
            found = Trial(trial).run(steps_per_trial)
        except Exception as error:
            raise AssertionError(f"trial {trial} failed: {error!r}") from error
        most = max(counts["in flight"], found.pop("in flight", 0))
        counts.update(found)
        counts["in flight"] = most
        counts["trials"] += 1
        trial += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="run this one trial again")
    arguments = parser.parse_args()
    began = time.perf_counter()
    total = Trial(arguments.trial).run(60) if arguments.trial is not None else fuzz(arguments.steps, arguments.seed)
    print(f"{time.perf_counter() - began:.1f} s", dict(sorted(total.items())))
    assert Status  # names that a debugger wants at hand
