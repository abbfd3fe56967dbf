"""Rows and their tenants: counters move in, move out, and a row knows who lives there."""

import numpy as np
import pytest

from quire.core.batch import MAX_STOP_IDS, UNLIMITED, Batch
from quire.core.sequence import RequestGroup, Sequence, Status
from quire.sampling_params import SamplingParams


def group(prompt: list[int], *, arrival: int = 0, priority: int = 0, max_tokens: int = 8, **params) -> RequestGroup:
    made = RequestGroup(
        request_id=str(arrival),
        prompt_token_ids=np.asarray(prompt, dtype=np.int32),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=0,
        arrival=arrival,
        priority=priority,
    )
    made.max_tokens = max_tokens
    return made


def test_a_group_starts_with_one_sequence_of_its_prompt() -> None:
    made = group([1, 2, 3], n=3)
    (sequence,) = made.sequences
    assert sequence.status is Status.WAITING and sequence.token_ids.tolist() == [1, 2, 3]
    assert sequence.num_output_tokens == 0
    assert not made.is_forked and made.num_rows == 3, "rows for those that fork later count too"
    assert group([1], n=1).is_forked


def test_counters_and_tokens_survive_a_stay_in_a_row() -> None:
    batch = Batch(2, 16)
    (sequence,) = group([1, 2, 3], min_tokens=2).sequences
    row = batch.add(sequence)
    assert sequence.status is Status.RUNNING and sequence.row == row
    assert (batch.max_total[row], batch.min_total[row], batch.limit[row]) == (11, 5, UNLIMITED)
    batch.token_ids[row, 3] = 9
    batch.num_tokens[row], batch.num_scheduled[row], batch.num_computed[row], batch.num_pending[row] = 4, 4, 3, 1
    batch.last_step[row] = 17
    assert sequence.output_token_ids.tolist() == [9]
    batch.remove(sequence)
    assert (sequence.row, sequence.batch, sequence.last_step) == (-1, None, 17)
    assert sequence.token_ids.tolist() == [1, 2, 3, 9]
    assert (sequence.num_scheduled, sequence.num_computed, sequence.num_pending) == (4, 3, 1)
    sequence.append_while_waiting([7])
    assert sequence.token_ids.tolist() == [1, 2, 3, 9, 7] and sequence.num_pending == 0
    row = batch.add(sequence)
    assert batch.token_ids[row, :5].tolist() == [1, 2, 3, 9, 7] and batch.last_step[row] == 17


def test_tokens_of_a_sequence_that_left_do_not_change_with_its_row() -> None:
    batch = Batch(1, 16)
    (first,), (second,) = group([1, 2]).sequences, group([8, 9]).sequences
    batch.add(first)
    batch.remove(first)
    batch.add(second)
    assert first.token_ids.tolist() == [1, 2]


def test_a_row_counts_its_tenants() -> None:
    batch = Batch(1, 16)
    epochs = []
    for _ in range(3):
        (sequence,) = group([1]).sequences
        batch.add(sequence)
        epochs.append(int(batch.epoch[0]))
        batch.remove(sequence)
    assert epochs == [0, 1, 2]
    assert batch.sequences[0] is None and batch.num_free_rows == 1 and batch.num_running == 0


def test_rows_are_ordered_by_priority_then_arrival_then_branch() -> None:
    batch = Batch(5, 16)
    late, early, urgent = group([1], arrival=2), group([1], arrival=1, n=3), group([1], arrival=3, priority=-1)
    early.sequences[0].fork()
    early.sequences[0].fork()
    for sequence in [*late.sequences, *early.sequences, *urgent.sequences]:
        batch.add(sequence)
    found = [(s.group.arrival, s.branch) for s in batch.sequences[batch.rows_in_order()]]
    assert found == [(3, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    batch.remove(early.sequences[0])
    assert len(batch.rows_in_order()) == 4


@pytest.mark.parametrize("count", [0, MAX_STOP_IDS, MAX_STOP_IDS + 1])
def test_a_row_knows_a_few_stop_ids_and_that_there_are_more(count: int) -> None:
    batch = Batch(1, 16)
    (sequence,) = group([1], stop_token_ids=list(range(10, 10 + count))).sequences
    row = batch.add(sequence)
    assert (batch.stop_ids[row] >= 0).sum() == min(count, MAX_STOP_IDS)
    assert batch.has_many_stop_ids[row] == (count > MAX_STOP_IDS)


def test_a_fork_has_its_parents_tokens_and_names_but_no_row_and_no_blocks() -> None:
    batch = Batch(2, 16)
    made = group([1, 2, 3], n=2)
    parent = made.sequences[0]
    parent.block_names = [b"x"]
    batch.add(parent)
    child: Sequence = parent.fork()
    parent.block_names.append(b"y")
    assert made.sequences == [parent, child] and child.branch == 1
    assert child.token_ids.tolist() == [1, 2, 3] and child.block_names == [b"x"]
    assert child.row == -1 and child.num_scheduled == 0


def test_a_group_is_finished_when_all_its_sequences_are() -> None:
    made = group([1], n=2)
    child = made.sequences[0].fork()
    made.is_forked = True
    made.sequences[0].status = Status.FINISHED
    assert made.live == [child] and made.num_rows == 1 and not made.is_finished
    child.status = Status.FINISHED
    assert made.is_finished


def test_recomputing_forgets_counts_and_a_rewind_keeps_the_first_tokens() -> None:
    (sequence,) = group([1, 2, 3, 4]).sequences
    sequence.rewind(3)
    assert (sequence.num_computed, sequence.num_scheduled) == (3, 3)
    sequence.num_published = 1
    sequence.forget_computed()
    assert (sequence.num_computed, sequence.num_scheduled, sequence.num_published) == (0, 0, 0)


def test_steps_may_be_counted_beyond_32_bits() -> None:
    """2**31 steps of 1 ms are 25 days."""
    batch = Batch(1, 16)
    batch.last_step[0] = 2**31 + 5
    assert batch.last_step[0] == 2**31 + 5
