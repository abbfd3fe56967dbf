"""The core under random load; and faults planted in it, each of which the same load must find."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from pretend import Trial, fuzz

from quire.core import admission, in_flight, kv_cache, scheduler
from quire.core.admission import AdmissionControl
from quire.core.batch import UNLIMITED, Batch
from quire.core.beam_groups import BeamGroups
from quire.core.block_pool import BlockPool
from quire.core.in_flight import StepsInFlight
from quire.core.kv_cache import KVCacheManager
from quire.core.prefix_cache import PrefixCache
from quire.core.rows import RowKeeper
from quire.core.sequence import Sequence, Status
from quire.core.transfers import Transfers

STEPS = 100_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_load_reads_back_right_tokens_and_accounts_for_every_slot() -> None:
    counts = fuzz(STEPS, seed=1)
    assert counts["steps"] >= STEPS
    assert counts["in flight"] == 4
    # the load reaches everything that it is there for
    for what in ("forks", "copies", "aborts", "stops", "recomputed", "swapped", "several tokens"):
        assert counts[what] > 100, (what, counts)
    for what in ("prefix hits", "partial hits", "preempted groups", "shared", "tokens"):
        assert counts[what] > 500, (what, counts)


def test_a_trial_depends_on_its_seed_alone() -> None:
    assert Trial(11).run(40) == Trial(11).run(40)


# -- planted faults: each takes monkeypatch and breaks one promise ----------------------------------------------------------
Fault = Callable[[pytest.MonkeyPatch], None]


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    plan = KVCacheManager.plan

    def broken(self, rows, starts, counts):
        made = plan(self, rows, starts, counts)
        made.needed -= sum(copy.astype(np.int32) for copy in made.copy)
        made.copy = [np.zeros_like(copy) for copy in made.copy]
        return made

    patch.setattr(KVCacheManager, "plan", broken)


def hit_covers_the_last_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AdmissionControl, "_max_hit", lambda self, group: group.live[0].num_tokens)


def partial_hit_is_a_token_too_long(patch: pytest.MonkeyPatch) -> None:
    longest_start = PrefixCache.longest_start

    def broken(self, parent, tokens):
        found = longest_start(self, parent, tokens)
        return found and (found[0], min(found[1] + 1, len(tokens) // 4))

    patch.setattr(PrefixCache, "longest_start", broken)


def source_of_a_partial_hit_is_not_pinned(patch: pytest.MonkeyPatch) -> None:
    attach = KVCacheManager.attach

    def broken(self, row, hit):
        attach(self, row, hit)
        self.pool.release(self._copied_from)
        self._copied_from = []

    patch.setattr(KVCacheManager, "attach", broken)


def free_without_a_stamp(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    patch.setattr(BlockPool, "release", lambda self, blocks, last_step=-1: release(self, blocks))


def fork_without_a_reference(patch: pytest.MonkeyPatch) -> None:
    def broken(self, source, target, num_tokens):
        for g in range(len(self.groups)):
            first = int(self.first_block[g][source])
            blocks = self.tables[g][source, first : -(-num_tokens // self.block_size)].tolist()
            self._set_row(g, target, blocks, first)

    patch.setattr(KVCacheManager, "fork", broken)


def name_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    chain = kv_cache.chain_name
    patch.setattr(kv_cache, "chain_name", lambda parent, tokens, extra=b"": chain(b"", tokens, extra))


def window_frees_a_block_too_early(patch: pytest.MonkeyPatch) -> None:
    free = KVCacheManager.free_behind_windows

    def broken(self, rows, last_step):
        self.batch.num_computed[rows] += self.block_size
        free(self, rows, last_step)
        self.batch.num_computed[rows] -= self.block_size

    patch.setattr(KVCacheManager, "free_behind_windows", broken)


def swapped_blocks_are_free_at_once(patch: pytest.MonkeyPatch) -> None:
    swap_out = KVCacheManager.swap_out

    def broken(self, sequences):
        transfer = swap_out(self, sequences)
        if transfer is not None:
            moving = self._moving[transfer.transfer_id]
            moving.pool.release(moving.blocks)
            moving.blocks = []
        return transfer

    patch.setattr(KVCacheManager, "swap_out", broken)


def swapped_in_group_runs_before_its_blocks_are_there(patch: pytest.MonkeyPatch) -> None:
    back = Transfers.back

    def broken(self, group):
        back(self, group)
        for sequence in group.live:
            self._batch.limit[sequence.row] = UNLIMITED

    patch.setattr(Transfers, "back", broken)


def swap_in_does_not_wait_for_swap_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transfers, "is_leaving", lambda self, group: False)


def wrong_guesses_are_not_rewound(patch: pytest.MonkeyPatch) -> None:
    append = StepsInFlight._append_special

    def broken(self, flight, result, sample, given):
        sequence = flight.sequences[flight.sample_index[sample]]
        row, before = sequence.row, self._batch.num_scheduled[sequence.row]
        append(self, flight, result, sample, given)
        if sequence.row == row >= 0 and sample in result.accepted:
            self._batch.num_scheduled[row] = before

    patch.setattr(StepsInFlight, "_append_special", broken)


def late_token_goes_to_the_next_tenant(patch: pytest.MonkeyPatch) -> None:
    remove = Batch.remove

    def broken(self, sequence):
        row = sequence.row
        remove(self, sequence)
        self.epoch[row] -= 1

    patch.setattr(Batch, "remove", broken)


def aborted_swapped_group_keeps_host_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, "drop_host", lambda self, sequence: None)


def tokens_behind_the_end_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_flight, "cut_behind_end", lambda sequence, tokens: None)


def budget_is_not_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler.np, "count_nonzero", lambda array: 0)


# -- of forks and beams
def candidates_are_used_twice(patch: pytest.MonkeyPatch) -> None:
    advance = BeamGroups._advance

    def broken(self, group, live):
        told = [sequence.candidates for sequence in live]
        ended = advance(self, group, live)
        for sequence, candidates in zip(live, told):
            sequence.candidates = candidates
        return ended

    patch.setattr(BeamGroups, "_advance", broken)


def what_a_swapped_beam_told_is_lost(patch: pytest.MonkeyPatch) -> None:
    take = BeamGroups.take

    def broken(self, sequence, candidates):
        if sequence.status is Status.RUNNING:
            take(self, sequence, candidates)

    patch.setattr(BeamGroups, "take", broken)


def beams_stand_in_another_order(patch: pytest.MonkeyPatch) -> None:
    advance = BeamGroups._advance

    def broken(self, group, live):
        ended = advance(self, group, live)
        group.sequences = group.sequences[::-1]
        return ended

    patch.setattr(BeamGroups, "_advance", broken)


def rows_are_not_kept_for_forks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowKeeper, "num_free", property(lambda self: self._batch.num_free_rows))


def fork_of_a_running_sequence_shares_what_is_not_computed(patch: pytest.MonkeyPatch) -> None:
    hit_of = AdmissionControl._hit

    def broken(self, group):
        source = group.source
        if source is not None and source.status is Status.RUNNING:
            common = min(admission.common_start(group.live[0], source), source.num_tokens, self._max_hit(group))
            columns = -(-common // self._kv.block_size)
            if all(count[source.row] >= columns for count in self._kv.num_blocks):
                return self._kv.shared_with(source, common) or hit_of(self, group)
        return hit_of(self, group)

    patch.setattr(AdmissionControl, "_hit", broken)


def copies_are_not_made(patch: pytest.MonkeyPatch) -> None:
    drain = KVCacheManager.drain
    patch.setattr(KVCacheManager, "drain", lambda self, step: (drain(self, step)[0], np.zeros((0, 2), dtype=np.int32)))


def a_token_that_was_decided_is_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowKeeper, "append", lambda self, sequence, token_id: sequence.append(token_id))


def what_is_recomputed_is_charged_again(patch: pytest.MonkeyPatch) -> None:
    forget = Sequence.forget_computed

    def broken(self):
        forget(self)
        self._num_charged = 0

    patch.setattr(Sequence, "forget_computed", broken)


FAULTS: list[Fault] = [
    no_copy_on_write,
    hit_covers_the_last_token,
    partial_hit_is_a_token_too_long,
    source_of_a_partial_hit_is_not_pinned,
    free_without_a_stamp,
    fork_without_a_reference,
    name_without_its_parent,
    window_frees_a_block_too_early,
    swapped_blocks_are_free_at_once,
    swapped_in_group_runs_before_its_blocks_are_there,
    swap_in_does_not_wait_for_swap_out,
    wrong_guesses_are_not_rewound,
    late_token_goes_to_the_next_tenant,
    aborted_swapped_group_keeps_host_blocks,
    tokens_behind_the_end_are_kept,
    budget_is_not_shared,
    candidates_are_used_twice,
    what_a_swapped_beam_told_is_lost,
    beams_stand_in_another_order,
    rows_are_not_kept_for_forks,
    fork_of_a_running_sequence_shares_what_is_not_computed,
    copies_are_not_made,
    a_token_that_was_decided_is_not_told,
    what_is_recomputed_is_charged_again,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_load_finds_a_planted_fault(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"trial .* failed") as caught:
        fuzz(20_000)
    cause = caught.value.__cause__
    assert not isinstance(cause, TypeError | AttributeError | NameError), "the fault itself does not fit the code"
    print(f"\n{fault.__name__}: {caught.value}")


def test_counts_name_what_happened() -> None:
    assert Counter(fuzz(200))["trials"] >= 1
