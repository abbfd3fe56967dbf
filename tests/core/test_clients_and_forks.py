"""Forks of running requests, clients that share the machine, and groups that do not come back too soon."""

import numpy as np
import pytest
from machine import RECOMPUTE, SIZE, SWAP, Machine

from quire.core.journal import Shortage
from quire.core.preemption import Cause, Preemption, Reason
from quire.core.sequence import RequestGroup, Status
from quire.errors import RequestError


# -- forks of running requests -------------------------------------------------------------------------------------------
def fork(m: Machine, parent: RequestGroup, more: tuple[int, ...] = (), **params: object) -> RequestGroup:
    source = parent.live[0]
    return m.add([*source.token_ids.tolist(), *more], source=source, **params)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [(), (3, 1, 4)])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("flights", [1, 3])
@pytest.mark.parametrize("computed", [12, 13], ids=["3 full blocks", "and a quarter"])
def test_a_branch_starts_in_its_parents_blocks(
    more: tuple[int, ...], cached: bool, flights: int, computed: int
) -> None:
    m = Machine(cached=cached, flights=flights)
    parent = m.add(10, max_tokens=20)
    m.steps(computed - 9)
    assert parent.live[0].num_computed == computed
    child = fork(m, parent, more, max_tokens=6)
    held = m.kv.pool.num_held
    m.step()
    prefix = child.journal.prefix
    assert prefix is not None and prefix.from_fork and prefix.num_tokens == computed
    # what is new: a copy of the fourth block, if it was begun, and what the tokens behind it need
    new = -(-(len(child.prompt_token_ids) + (flights > 1)) // SIZE) - 3
    assert m.kv.pool.num_held - held in (new, new + 1)
    assert m.sharing(parent)[0][:3] == m.sharing(child)[0][:3]
    m.finish()
    assert m.answers_are_right(parent, child)


def test_a_branch_comes_right_behind_its_parent_in_the_queue() -> None:
    m = Machine(rows=2)
    parent = m.add(6, max_tokens=20)
    m.add(6, max_tokens=20)
    m.step()
    later = m.add(6)
    child = fork(m, parent)
    grandchild = fork(m, child)
    assert parent.arrival < child.arrival < grandchild.arrival < later.arrival
    m.finish()
    assert m.answers_are_right(parent, later, child, grandchild)


def test_a_branch_of_a_parent_that_is_swapped_out_finds_its_own_way() -> None:
    m = Machine(num_host=16, policy=SWAP, cached=False)
    parent = m.add(9, max_tokens=12)
    m.steps(3)
    m.scheduler._preempt(parent)
    child = fork(m, parent, max_tokens=5)
    m.finish()
    assert child.journal.prefix is not None and not child.journal.prefix.from_fork
    assert m.answers_are_right(parent, child)


def test_a_branch_whose_parent_has_ended_meanwhile_is_a_request_like_others() -> None:
    m = Machine(rows=1)
    parent = m.add(9, max_tokens=4)
    m.steps(2)
    child = fork(m, parent, max_tokens=5)
    m.finish()
    assert child.source is None and m.answers_are_right(parent, child)


def test_a_branch_that_can_never_fit_is_refused_and_leaves_nothing() -> None:
    m = Machine(num_blocks=8, max_len=32)
    parent = m.add(9, max_tokens=12)
    m.steps(2)
    with pytest.raises(RequestError, match="KV blocks"):
        fork(m, parent, n=8, max_tokens=20)
    m.finish()
    assert m.answers_are_right(parent)


def test_killing_a_branch_frees_what_it_alone_holds_at_once() -> None:
    m = Machine()
    parent = m.add(10, max_tokens=20)
    m.steps(4)
    before = m.kv.pool.num_held
    child = fork(m, parent, (1, 2, 3, 4, 5, 6))
    m.step()
    assert m.kv.pool.num_held > before
    m.scheduler.abort(child.request_id)
    assert m.kv.pool.num_held <= before + 1  # the parent has gone on by a token
    m.finish()
    assert m.answers_are_right(parent)


# -- clients -------------------------------------------------------------------------------------------------------------
def test_a_client_that_finds_no_row_displaces_the_last_of_one_that_has_more_than_its_share() -> None:
    m = Machine(rows=4, policy=RECOMPUTE)
    flood = [m.add(4, client="flood", max_tokens=30) for _ in range(8)]
    m.steps(3)
    small = m.add(4, client="small", max_tokens=3)
    m.step()
    assert small.live[0].status is Status.RUNNING
    displaced = [group for group in flood if group.num_preemptions]
    assert displaced == [flood[3]], "the latest of those that ran"
    assert displaced[0].journal.preemptions[0].cause is Cause.FAIRNESS
    m.finish()
    assert m.answers_are_right(small, *flood)
    assert m.scheduler.counts.preemptions == {(Preemption.RECOMPUTE, Cause.FAIRNESS, Reason.POLICY): 1}


def test_two_clients_with_their_shares_do_not_displace_each_other() -> None:
    m = Machine(rows=4, policy=RECOMPUTE)
    groups = [m.add(4, client=name, max_tokens=20) for _ in range(6) for name in ("a", "b")]
    m.finish()
    assert not any(group.num_preemptions for group in groups) and m.answers_are_right(*groups)


def test_a_client_of_a_higher_priority_number_displaces_nobody() -> None:
    m = Machine(rows=2, policy=RECOMPUTE)
    flood = [m.add(4, client="flood", max_tokens=20) for _ in range(2)]
    m.step()
    late = m.add(4, client="small", priority=1)
    m.finish()
    assert not any(group.num_preemptions for group in flood) and m.answers_are_right(late, *flood)


def test_a_prompt_that_catches_up_leaves_tokens_to_a_client_that_was_given_less() -> None:
    m = Machine(rows=4, budget=8, max_len=128)
    long = m.add(100, client="flood", max_tokens=2)
    m.steps(3)
    short = m.add(5, client="small", max_tokens=2)
    output = m.step()
    assert output is not None
    counts = dict(zip(output.rows.tolist(), output.num_tokens.tolist()))
    assert counts == {short.live[0].row: 5, long.live[0].row: 3}
    m.finish()


def test_weights_decide_who_gets_how_much() -> None:
    m = Machine(rows=2, max_len=256)
    m.scheduler.counters.weights.update({"dear": 3.0})
    groups = {name: [m.add(8, client=name, max_tokens=8) for _ in range(40)] for name in ("dear", "cheap")}
    m.steps(120)
    done = {name: sum(group.is_finished for group in found) for name, found in groups.items()}
    assert done["dear"] > 2 * done["cheap"] > 0
    m.finish()


def test_tokens_that_are_computed_again_are_not_charged_again() -> None:
    m = Machine(policy=RECOMPUTE, cached=False)
    group = m.add(10, client="a", max_tokens=8)
    m.steps(4)
    given = m.scheduler.counters.counter("a")
    assert given == 10 + 2 * 3  # the prompt, and three tokens that were written and read again
    m.scheduler._preempt(group)
    m.step()
    assert m.scheduler.counters.counter("a") == pytest.approx(given + 1, abs=1)
    m.finish()


# -- coming back ---------------------------------------------------------------------------------------------------------
def test_a_preempted_group_comes_back_with_room_to_go_on() -> None:
    m = Machine(num_blocks=14, max_len=64, policy=RECOMPUTE, cached=False)
    first, second = m.add(8, max_tokens=40), m.add(8, max_tokens=40)
    while not second.num_preemptions:
        m.steps(1)
    at = second.journal.preemptions[0].step
    m.finish()
    assert second.num_preemptions == 1, "it would have come back to be preempted a block later"
    assert second.journal.waited[Shortage.BLOCKS] > 0 and second.journal.admitted_step == 0 < at
    assert m.answers_are_right(first, second)


def test_the_journal_says_where_the_prefix_first_differed() -> None:
    m = Machine()
    m.add([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], max_tokens=1)
    m.finish()
    other = m.add([9, 8, 7, 6, 5, 11, 12, 13, 14], max_tokens=1)
    m.finish()
    prefix = other.journal.prefix
    assert prefix is not None and (prefix.num_tokens, prefix.token, prefix.cached_tokens) == (5, 11, [4])
    assert not prefix.from_fork and len(prefix.blocks) == 1
    assert isinstance(prefix.blocks[0], int) and np.all(np.asarray(prefix.blocks) > 0)
