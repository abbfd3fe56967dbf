"""Who runs when, step by step, with a worker whose KV memory holds token ids (see `pretend`). Blocks hold 4 tokens."""

import pytest
from machine import RECOMPUTE, SIZE, SWAP, Machine

from quire.core.batch import MAX_STOP_IDS
from quire.core.in_flight import StepTokens
from quire.core.preemption import Preemption, PreemptionPolicy, SwapForks
from quire.core.scheduler import Shortage
from quire.core.sequence import FinishReason, RequestGroup, Status
from quire.core.step import SchedulerOutput
from quire.errors import RequestError


def by_row(m: Machine, output: SchedulerOutput) -> dict[str, int]:
    """request id -> tokens in this step"""
    found: dict[str, int] = {}
    for row, count in zip(output.rows.tolist(), output.num_tokens.tolist()):
        request_id = m.batch.sequences[row].group.request_id
        found[request_id] = found.get(request_id, 0) + count
    return found


def statuses(*groups: RequestGroup) -> list[Status]:
    return [group.sequences[0].status for group in groups]


# -- the token budget --------------------------------------------------------------------------------------------------
def test_who_decodes_comes_first_and_prompts_share_what_is_left() -> None:
    m = Machine(budget=8)
    m.add(4, request_id="a")
    m.steps(1)
    m.add(20, request_id="b")
    m.add(3, request_id="c")
    chunks = []
    for _ in range(4):
        output = m.plan()
        assert output is not None and output.total_num_tokens <= 8
        chunks.append(by_row(m, output))
        m.back()
    assert chunks == [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 6, "c": 1}, {"a": 1, "b": 1, "c": 2}]
    m.finish()


def test_a_chunk_that_does_not_end_the_prompt_samples_nothing() -> None:
    m = Machine(budget=8)
    m.add(20)
    samples = []
    for _ in range(3):
        output = m.step()
        assert output is not None
        samples.append(output.sample_positions.tolist())
    assert samples == [[], [], [20]]


def test_a_budget_below_the_number_of_rows_serves_the_first_ones() -> None:
    m = Machine(budget=2)
    groups = [m.add(1) for _ in range(3)]
    m.finish()
    assert m.answers_are_right(*groups)


# -- order of admission ------------------------------------------------------------------------------------------------
def test_the_first_in_line_holds_up_those_behind_it() -> None:
    m = Machine(num_blocks=8, max_len=32)
    running, large, small = m.add(16), m.add(20), m.add(1)
    m.steps(1)
    assert statuses(running, large, small) == [Status.RUNNING, Status.WAITING, Status.WAITING]
    assert m.scheduler.waiting_for is Shortage.BLOCKS
    m.finish()
    assert m.answers_are_right(running, large, small)


def test_a_lower_priority_value_is_admitted_first_and_equals_by_arrival() -> None:
    m = Machine(rows=1)
    groups = [m.add(2, priority=priority, max_tokens=1) for priority in (1, 0, 0, -1)]
    order = []
    while (output := m.plan()) is not None:
        order.append(m.batch.sequences[output.rows[0]].group)
        m.back()
    assert order == [groups[i] for i in (3, 1, 2, 0)]


def test_rows_are_kept_for_forks_that_come_after_the_prefill() -> None:
    m = Machine(rows=4, budget=4)
    forking, other = m.add(10, n=3), m.add(2, n=2)
    m.steps(1)
    assert m.batch.num_free_rows == 3
    assert statuses(forking, other) == [Status.RUNNING, Status.WAITING]
    m.steps(2)
    assert m.batch.num_free_rows == 1 and m.scheduler.waiting_for is Shortage.ROWS
    m.finish()
    assert m.answers_are_right(forking, other)


@pytest.mark.parametrize(("free", "admitted"), [(0.0, True), (0.25, False)])
def test_the_watermark_leaves_blocks_to_those_that_run(free: float, admitted: bool) -> None:
    m = Machine(num_blocks=8, watermark=free)
    m.add(16)  # 4 blocks, and a fifth for its answer
    m.steps(1)
    second = m.add(8)
    m.plan()
    assert (second.sequences[0].status is Status.RUNNING) == admitted
    m.back()
    m.finish()


def test_the_watermark_does_not_stop_a_group_that_is_alone() -> None:
    m = Machine(num_blocks=4, watermark=0.5)
    group = m.add(10, max_tokens=6)
    m.finish()
    assert m.answers_are_right(group)


# -- never -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        (32, {}, "prompt", "the prompt has 32 tokens; max_model_len=32 must leave room for one more"),
        (1, {"n": 5}, "n", "n=5 is more than max_num_seqs=4"),
        (4, {"n": 4, "max_tokens": 20}, "max_tokens", r"may need 21 KV blocks .* the engine has 20"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_reason(
    prompt: int, params: dict, param: str, message: str
) -> None:
    m = Machine(num_blocks=20, rows=4, max_len=32)
    with pytest.raises(RequestError, match=message) as caught:
        m.add(prompt, **params)
    assert caught.value.param == param
    assert not m.scheduler.has_unfinished and m.scheduler.num_waiting == 0
    m.add(4, n=4, max_tokens=17)  # 1 + 4 x 4 blocks: what just fits is taken ...
    m.finish()  # ... and runs


def test_a_request_that_just_fits_runs_alone_with_every_block() -> None:
    m = Machine(num_blocks=1 + 4 * 4, rows=4, max_len=32, cached=False)
    group = m.add(4, n=4, max_tokens=17)
    most = 0
    while m.step() is not None:
        most = max(most, m.kv.pool.num_held)
    assert most == 17 and m.answers_are_right(group) and not group.num_preemptions


# -- ends --------------------------------------------------------------------------------------------------------------
def test_max_tokens_ends_an_answer() -> None:
    m = Machine()
    group = m.add(3, max_tokens=5)
    m.finish()
    (sequence,) = group.sequences
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.LENGTH, None)
    assert m.answers_are_right(group) and sequence.num_output_tokens == 5


def test_the_models_length_ends_an_answer() -> None:
    m = Machine(max_len=16)
    group = m.add(10, max_tokens=None)
    m.finish()
    assert group.max_tokens == 6 and group.sequences[0].num_tokens == 16
    assert group.sequences[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("others", [0, MAX_STOP_IDS + 3], ids=["few", "many"])
@pytest.mark.parametrize("flights", [1, 3])
def test_a_stop_token_ends_an_answer_and_is_told(others: int, flights: int) -> None:
    m = Machine(flights=flights)
    prompt = [9, 9, 9]
    expected = m.answer(m.add(prompt, max_tokens=20))
    stop = expected[4]
    end = expected.index(stop) + 1
    group = m.add(prompt, max_tokens=20, stop_token_ids=[*range(50, 50 + others), stop])
    m.finish()
    (sequence,) = group.sequences
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, stop)
    assert sequence.output_token_ids.tolist() == expected[:end], "no token of a step in flight came after"


def test_the_end_of_text_token_ends_an_answer_without_a_stop_reason() -> None:
    m = Machine()
    prompt = [9, 9, 9]
    expected = m.answer(m.add(prompt, max_tokens=20))
    group = m.add(prompt, max_tokens=20, eos=(expected[0],), stop_token_ids=[expected[0]])
    m.finish()
    (sequence,) = group.sequences
    assert (sequence.finish_reason, sequence.stop_reason, sequence.num_output_tokens) == (FinishReason.STOP, None, 1)


@pytest.mark.parametrize("others", [0, MAX_STOP_IDS + 3], ids=["few", "many"])
def test_nothing_ends_an_answer_before_min_tokens(others: int) -> None:
    m = Machine()
    prompt = [9, 9, 9]
    expected = m.answer(m.add(prompt, max_tokens=40))
    stop = expected[0]
    end = expected.index(stop, 3) + 1  # the first one that may end it
    group = m.add(prompt, max_tokens=40, min_tokens=4, stop_token_ids=[*range(50, 50 + others), stop])
    m.finish()
    assert group.sequences[0].output_token_ids.tolist() == expected[:end]


def test_an_error_of_one_sample_ends_that_sequence_alone() -> None:
    m = Machine()
    group = m.add(3, n=2)
    m.steps(2)
    m.plan()
    result = m.worker.run(m.flights.popleft(), m.rng, 0.0, 0.0)
    result.errors = {1: "not a number"}
    given = m.scheduler.update(result)
    assert given.finished == [group.sequences[1]] and given.samples == [0]
    assert (group.sequences[1].finish_reason, group.sequences[1].error) == (FinishReason.ERROR, "not a number")
    m.finish()
    assert group.sequences[0].output_token_ids.tolist() == m.answer(group)


# -- forks: the paper's counts -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", [1, 4, 7, 8, 10])
def test_n_answers_take_the_prompts_full_blocks_once_and_the_rest_each(prompt: int) -> None:
    """n = 8 after one prefill. With P prompt tokens and k tokens of each answer in memory the group holds

        floor(P / 4)  +  8 x (ceil((P + k) / 4) - floor(P / 4))     blocks

    P = 10, k = 1: 2 + 8 x 1 = 10, where eight copies of the prompt would take 24. The first tokens cost 7 copies: the last
    writer of the shared partial block writes in place.
    """
    n = 8
    m = Machine(num_blocks=100, cached=False)
    group = m.add(prompt, n=n, max_tokens=12)
    output = m.step()
    assert output is not None and output.total_num_tokens == prompt, "one prefill"
    assert output.sample_entries.tolist() == [0] * n and output.sample_positions.tolist() == [prompt] * n
    assert m.kv.pool.num_held == -(-prompt // SIZE)
    shared = prompt // SIZE
    for k in range(1, 12):
        m.plan()
        assert m.kv.pool.num_held == shared + n * (-(-(prompt + k) // SIZE) - shared)
        assert m.kv.num_copies == (n - 1 if prompt % SIZE else 0)
        m.back()
    assert group.is_finished and m.answers_are_right(group)
    m.finish()


def test_siblings_draw_by_their_own_branch() -> None:
    m = Machine()
    group = m.add(6, n=4, max_tokens=10)
    m.finish()
    assert m.answers_are_right(group)
    assert len({tuple(sequence.output_token_ids.tolist()) for sequence in group.sequences}) > 1


def test_a_sibling_that_ends_gives_its_own_blocks_back_only() -> None:
    m = Machine(cached=False)
    group = m.add(8, n=2)
    m.steps(2)
    assert m.kv.pool.num_held == 2 + 2
    m.scheduler.finish(group.sequences[0], FinishReason.STOP, "a stop string")
    assert m.kv.pool.num_held == 2 + 1
    assert group.sequences[0].stop_reason == "a stop string"
    m.finish()
    assert group.sequences[1].output_token_ids.tolist() == m.answer(group, 1)


# -- prefix hits -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 11, 12, 13])
def test_a_hit_never_covers_the_last_token(length: int) -> None:
    m = Machine()
    stem = list(range(50, 66))
    m.add(stem, max_tokens=1)
    m.finish()
    group = m.add(stem[:length])
    output = m.step()
    assert output is not None and group.num_cached_tokens == length - 1
    assert (output.starts.tolist(), output.num_tokens.tolist()) == ([length - 1], [1])
    m.finish()
    assert m.answers_are_right(group)


def test_a_hit_ends_at_the_token_that_differs() -> None:
    m = Machine()
    m.add(list(range(50, 66)), max_tokens=1)
    m.finish()
    group = m.add([50, 51, 52, 53, 54, 55, 99, 57, 58])
    m.finish()
    assert group.num_cached_tokens == 6 and m.kv.num_copies == 1 and m.answers_are_right(group)
    assert (m.kv.num_prefix_hits, m.kv.num_prefix_queries) == (6, 16 + 9)


def test_answers_are_cached_too() -> None:
    m = Machine()
    first = m.add(6, max_tokens=8)
    m.finish()
    turn = first.sequences[0].token_ids.tolist()  # 14 tokens, of which the last was never computed
    second = m.add([*turn, 99], max_tokens=8)
    m.finish()
    assert second.num_cached_tokens == 12 and m.answers_are_right(second)


def test_whoever_asks_for_prompt_logprobs_computes_the_whole_prompt() -> None:
    m = Machine()
    stem = list(range(50, 66))
    m.add(stem, max_tokens=1)
    m.finish()
    group = m.add(stem, prompt_logprobs=0)
    output = m.step()
    assert output is not None and output.num_tokens.tolist() == [16] and group.num_cached_tokens == 0


def test_a_running_sequences_blocks_are_hit_as_soon_as_their_step_has_run() -> None:
    m = Machine(flights=2)
    stem = list(range(50, 62))
    m.add(stem)
    m.plan()
    early = m.add([*stem, 1])
    m.plan()
    assert early.num_cached_tokens == 0, "the step that fills them is in flight"
    m.back()
    late = m.add([*stem, 2])
    m.plan()
    assert late.num_cached_tokens == 12
    m.finish()


# -- windows -----------------------------------------------------------------------------------------------------------
def test_a_window_holds_as_many_blocks_as_it_needs_however_long_the_answer() -> None:
    """Window 6 while decoding: the query at 8 sees 3 .. 8, in 3 blocks; the one at 9 sees 4 .. 9, in 2."""
    m = Machine(windows=(6,), cached=False)
    group = m.add(4, max_tokens=50)
    held = []
    while m.plan() is not None:
        held.append(m.kv.pool.num_held)
        m.back()
    assert held[:9] == [1, 2, 2, 2, 2, 3, 2, 2, 2] and max(held) == 3 and m.answers_are_right(group)


def test_full_and_windowed_layers_have_tables_of_their_own() -> None:
    m = Machine(windows=(None, 6), cached=False)
    group = m.add(4, max_tokens=40)
    m.steps(40 - 1)
    row = group.sequences[0].row
    assert [len(m.kv.blocks_of(g, row)) for g in (0, 1)] == [11, 2]
    m.finish()
    assert m.answers_are_right(group)


# -- preemption --------------------------------------------------------------------------------------------------------
def two_that_collide(policy: PreemptionPolicy, num_host: int = 32, n: int = 1) -> tuple[Machine, list[RequestGroup]]:
    """Two groups, and a pool in which only one of them can run to its end at a time."""
    m = Machine(num_blocks=2 + 6 * n, policy=policy, num_host=num_host, cached=False)
    groups = [m.add(8, max_tokens=14, n=n) for _ in range(2)]
    for _ in range(100):
        assert m.plan() is not None
        if any(group.num_preemptions for group in groups):
            return m, groups
        m.back()
    raise AssertionError("nobody was preempted")


def test_the_latest_to_arrive_is_preempted() -> None:
    m, (first, second) = two_that_collide(RECOMPUTE)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert statuses(first, second) == [Status.RUNNING, Status.WAITING]
    m.finish()
    assert m.answers_are_right(first, second)


def test_the_lowest_priority_is_preempted_though_it_came_first() -> None:
    m = Machine(num_blocks=10, policy=RECOMPUTE, cached=False)
    low, high = m.add(8, max_tokens=14, priority=1), m.add(8, max_tokens=14)
    m.finish()
    assert low.num_preemptions > 0 and high.num_preemptions == 0
    assert m.answers_are_right(low, high)


@pytest.mark.parametrize("policy", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
def test_nothing_new_is_admitted_while_preempted_work_waits(policy: PreemptionPolicy) -> None:
    m, (first, second) = two_that_collide(policy)
    m.back()
    tiny = m.add(1, max_tokens=1)  # it would fit
    while second.sequences[0].status is not Status.RUNNING:
        assert tiny.sequences[0].status is Status.WAITING
        assert m.step() is not None
    m.finish()
    assert m.answers_are_right(first, second, tiny)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("policy", [RECOMPUTE, SWAP, SwapForks()], ids=["recompute", "swap", "forks"])
@pytest.mark.parametrize("flights", [1, 3])
def test_a_preempted_group_goes_on_with_the_same_tokens(policy: PreemptionPolicy, n: int, flights: int) -> None:
    m = Machine(num_blocks=4 + 6 * n, policy=policy, num_host=32, cached=False, flights=flights)
    groups = [m.add(8, max_tokens=14, n=n) for _ in range(3)]
    m.finish()
    assert sum(group.num_preemptions for group in groups) > 0
    assert m.answers_are_right(*groups)
    counts = m.scheduler.counts
    swaps = policy is SWAP or (isinstance(policy, SwapForks) and n > 1)
    assert counts.preempted(Preemption.SWAP if swaps else Preemption.RECOMPUTE) > 0


@pytest.mark.parametrize("policy", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
def test_siblings_share_as_much_after_they_come_back_as_before(policy: PreemptionPolicy) -> None:
    m = Machine(policy=policy, num_host=64, cached=False)
    group = m.add(10, n=4, max_tokens=12)
    m.steps(6)
    tables, held = m.sharing(group), m.kv.pool.num_held
    tokens = [sequence.num_tokens for sequence in group.live]
    m.scheduler._preempt(group)
    assert m.batch.num_running == 0
    if policy is SWAP:  # the very same tables
        while not all(sequence.status is Status.RUNNING for sequence in group.live):
            assert m.step() is not None
        assert (m.sharing(group), m.kv.pool.num_held) == (tables, held)
    else:  # perhaps more is shared than before, where answers began alike
        while not all(sequence.num_tokens > count for sequence, count in zip(group.live, tokens)):
            assert m.step() is not None
        private = sum(-(-sequence.num_scheduled // SIZE) - 10 // SIZE for sequence in group.live)
        assert m.kv.pool.num_held <= 10 // SIZE + private
    m.finish()
    assert m.answers_are_right(group)


def test_recomputing_prefills_what_siblings_have_in_common_once() -> None:
    m = Machine(policy=RECOMPUTE, cached=False)
    group = m.add(16, n=4, max_tokens=8)
    m.steps(4)
    m.scheduler._preempt(group)
    computed = 0
    while not all(sequence.num_tokens > 16 + 4 for sequence in group.live):
        output = m.step()
        assert output is not None
        computed += output.total_num_tokens
    assert computed <= 16 + 4 * 5, "the prompt once, and the answers' tokens"
    m.finish()
    assert m.answers_are_right(group)


def test_a_host_that_is_full_makes_a_swap_a_recomputation() -> None:
    m, groups = two_that_collide(SWAP, num_host=2)
    assert groups[1].sequences[0].status is Status.WAITING
    m.finish()
    assert m.scheduler.counts.preempted(Preemption.SWAP) == 0
    assert m.scheduler.counts.preempted(Preemption.RECOMPUTE) > 0
    assert m.answers_are_right(*groups)


def test_a_swapped_group_computes_nothing_before_its_blocks_are_there() -> None:
    m = Machine(policy=SWAP, num_host=8, cached=False)
    group = m.add(6)
    m.steps(2)
    (sequence,) = group.sequences
    m.scheduler._preempt(group)
    m.worker.transfer_rate = 0.0  # transfers take long
    out = m.step()
    assert out is not None and len(out.swap_out) == 1 and out.total_num_tokens == 0
    m.steps(3)
    assert sequence.status is Status.SWAPPED and m.scheduler.waiting_for is Shortage.IN_FLIGHT
    m.worker.transfer_rate = 1.0
    m.steps(1)
    m.worker.transfer_rate = 0.0
    back = m.step()
    assert back is not None and len(back.swap_in) == 1 and back.total_num_tokens == 0
    assert sequence.status is Status.RUNNING
    m.steps(3)
    assert sequence.num_scheduled == 7, "it still waits"
    m.worker.transfer_rate = 1.0
    m.finish()
    assert m.answers_are_right(group)


# -- abort, in every state ---------------------------------------------------------------------------------------------
def abort(m: Machine, group: RequestGroup) -> None:
    assert m.scheduler.abort(group.request_id)
    assert group.is_finished and {s.finish_reason for s in group.sequences} == {FinishReason.ABORT}
    assert not m.scheduler.abort(group.request_id), "it isn't there any more"
    m.finish()


def test_abort_while_waiting() -> None:
    m = Machine(rows=1)
    first, second = m.add(4), m.add(4)
    m.steps(1)
    abort(m, second)
    assert m.answers_are_right(first)


@pytest.mark.parametrize("flights", [0, 1, 3])
def test_abort_in_the_middle_of_a_prompt(flights: int) -> None:
    m = Machine(budget=4, flights=4)
    group = m.add(30, n=2)
    m.steps(2)
    for _ in range(flights):
        m.plan()
    abort(m, group)


@pytest.mark.parametrize("flights", [0, 1, 3])
def test_abort_while_decoding_frees_blocks_when_the_last_step_in_flight_has_run(flights: int) -> None:
    m = Machine(flights=4)
    group = m.add(6, n=3)
    m.steps(3)
    for _ in range(flights):
        m.plan()
    held = m.kv.pool.num_held
    m.scheduler.abort(group.request_id)
    assert m.kv.pool.num_pending == (held if flights else 0) and m.kv.pool.num_held == 0
    for _ in range(flights):
        assert m.kv.pool.num_pending > 0
        given = m.back()
        assert not given.token_ids and not given.finished
    assert m.kv.pool.num_pending == 0
    m.finish()


def test_abort_while_preempted_to_be_recomputed() -> None:
    m, (_, second) = two_that_collide(RECOMPUTE)
    abort(m, second)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_on_the_way_out_on_the_host_and_on_the_way_back(steps: int) -> None:
    m = Machine(policy=SWAP, num_host=32, cached=False)
    m.worker.transfer_rate = 0.4
    group = m.add(10, n=3)
    m.steps(4)
    m.scheduler._preempt(group)
    m.steps(steps)
    abort(m, group)


def test_abort_while_siblings_wait_for_the_one_that_they_fork_from() -> None:
    m = Machine(policy=RECOMPUTE, budget=3, cached=False)
    group = m.add(12, n=3)
    m.steps(8)
    m.scheduler._preempt(group)
    m.steps(2)
    assert m.scheduler._forks, "they wait"
    abort(m, group)
    assert not m.scheduler._forks


def test_a_source_that_ends_leaves_what_it_has_to_those_that_wait_for_it() -> None:
    m = Machine(policy=RECOMPUTE, budget=3, cached=False)
    group = m.add(12, n=3)
    m.steps(8)
    m.scheduler._preempt(group)
    m.steps(2)
    m.scheduler.finish(group.sequences[0], FinishReason.STOP, "a stop string")
    m.finish()
    assert all(s.output_token_ids.tolist() == m.answer(group, s.branch) for s in group.sequences[1:])


def test_a_sequence_that_ends_while_it_waits_does_not_hold_up_its_source() -> None:
    m = Machine(policy=RECOMPUTE, budget=3, cached=False)
    group = m.add(12, n=2)
    m.steps(8)
    m.scheduler._preempt(group)
    m.steps(2)
    m.scheduler.finish(group.sequences[1], FinishReason.STOP, "a stop string")
    m.finish()


# -- steps in flight ---------------------------------------------------------------------------------------------------
def test_steps_are_planned_ahead_of_known_tokens() -> None:
    m = Machine(flights=3)
    group = m.add(5)
    planned = [m.plan() for _ in range(3)]
    assert [step and step.starts.tolist() for step in planned] == [[0], [5], [6]]
    assert [step and step.sample_positions.tolist() for step in planned] == [[5], [6], [7]]
    assert m.plan() is None, "no more than three"
    assert group.sequences[0].num_tokens == 5 and group.sequences[0].num_pending == 3
    m.finish()
    assert m.answers_are_right(group)


def test_nothing_is_planned_beyond_max_tokens() -> None:
    m = Machine(flights=8)
    m.add(5, max_tokens=3)
    assert [m.plan() is not None for _ in range(4)] == [True, True, True, False]
    m.finish()


def test_the_tokens_of_steps_in_flight_are_thrown_away_when_a_sequence_stops() -> None:
    m = Machine(flights=3)
    expected = m.answer(m.add([9, 9], max_tokens=20))
    m.finish()
    group = m.add([9, 9], max_tokens=20, stop_token_ids=[expected[0]])
    for _ in range(3):
        m.plan()
    given = m.back()
    assert given.token_ids == expected[:1] and given.finished == group.sequences
    assert m.kv.pool.num_pending > 0, "two steps in flight still write for it"
    for _ in range(2):
        given = m.back()
        assert not given.sequences and not given.finished
    assert m.kv.pool.num_pending == 0
    assert group.sequences[0].output_token_ids.tolist() == expected[:1]


def test_a_late_token_does_not_go_to_the_rows_next_tenant() -> None:
    m = Machine(rows=1, flights=3)
    first = m.add(5)
    for _ in range(2):
        m.plan()
    m.scheduler.abort(first.request_id)
    second = m.add(3)
    output = m.plan()
    assert output is not None and output.rows.tolist() == [0] and output.new_rows[0].num_prompt_tokens == 3
    m.back()
    m.back()
    assert second.sequences[0].num_output_tokens == 0
    m.finish()
    assert m.answers_are_right(second)


def test_a_preempted_sequence_keeps_the_token_of_a_step_in_flight() -> None:
    m = Machine(policy=RECOMPUTE, flights=3, cached=False)
    group = m.add(5)
    m.plan()
    m.plan()
    m.scheduler._preempt(group)
    assert m.plan() is None and m.scheduler.waiting_for is Shortage.IN_FLIGHT
    assert m.back().token_ids == m.answer(group)[:1]
    assert m.back().token_ids == m.answer(group)[1:2]
    output = m.plan()
    assert output is not None and output.num_tokens.tolist() == [7]
    m.finish()
    assert m.answers_are_right(group)


# -- drafts ------------------------------------------------------------------------------------------------------------
def drafted(right: int, wrong: int) -> tuple[Machine, RequestGroup, SchedulerOutput, StepTokens]:
    m = Machine()
    group = m.add(5, max_tokens=12)
    expected = m.answer(group)
    m.plan()
    m.back(guesses=[*expected[1 : 1 + right], *[4 - token for token in expected[1 + right : 1 + right + wrong]]])
    output = m.plan()
    assert output is not None
    return m, group, output, m.back()


def test_guesses_that_are_right_give_several_tokens_in_a_step() -> None:
    m, group, output, given = drafted(right=3, wrong=0)
    assert output.num_tokens.tolist() == [4] and output.draft_token_ids == {0: m.answer(group)[1:4]}
    assert given.token_ids == m.answer(group)[1:5] and given.samples == [0] * 4
    assert group.sequences[0].num_computed == 5 + 4
    m.finish()
    assert m.answers_are_right(group)


def test_guesses_behind_a_wrong_one_are_computed_again() -> None:
    m = Machine()
    group = m.add(5, max_tokens=12)
    expected = m.answer(group)
    wrong = (expected[2] + 1) % 5
    m.plan()
    m.back(guesses=[expected[1], wrong, expected[3]])
    m.plan()
    given = m.back()
    assert given.token_ids == expected[1:3]
    (sequence,) = group.sequences
    assert (sequence.num_tokens, sequence.num_scheduled, sequence.num_computed) == (8, 7, 7)
    output = m.plan()
    assert output is not None and (output.starts.tolist(), output.num_tokens.tolist()) == ([7], [1])
    m.finish()
    assert m.answers_are_right(group)


def test_guesses_are_cut_at_the_budget_and_at_the_end() -> None:
    for budget, max_tokens, kept in ((3, 12, 2), (64, 4, 2), (64, 2, 0)):
        m = Machine(budget=budget)
        group = m.add(3, max_tokens=max_tokens)
        m.plan()
        m.back(guesses=m.answer(group, length=9)[1:9])
        output = m.plan()
        assert output is not None and output.num_tokens.tolist() == [1 + kept]
        m.finish()
        assert m.answers_are_right(group)


def test_accepted_tokens_behind_a_stop_are_thrown_away() -> None:
    m = Machine()
    probe = m.add([9, 9], max_tokens=20)
    expected = m.answer(probe)
    m.finish()
    # a token that is first drawn at index 1 to 4
    stop = next(token for token in expected[1:] if token != expected[0])
    end = expected.index(stop) + 1
    group = m.add([9, 9], max_tokens=20, stop_token_ids=[stop])
    m.plan()
    m.back(guesses=expected[1 : end + 3])
    m.plan()
    assert m.back().token_ids == expected[1:end]
    assert group.sequences[0].finish_reason is FinishReason.STOP
    m.finish()


def test_siblings_with_a_window_come_back_after_a_recomputation() -> None:
    m = Machine(18, windows=(8,), budget=16, max_len=128, policy=RECOMPUTE)
    group = m.add(2, n=2, max_tokens=100)
    m.steps(80)
    m.scheduler._preempt(group)
    m.finish()
    assert m.answers_are_right(group)


def test_a_fork_knows_what_is_computed_when_all_steps_are_back() -> None:
    m = Machine(flights=2, budget=3, policy=RECOMPUTE, cached=False)
    group = m.add(16, n=2, max_tokens=40)
    m.steps(30)
    m.scheduler._preempt(group)
    m.steps(1)
    while m.scheduler._forks:
        if m.plan() is None or len(m.flights) == 2:
            m.back()
    while m.flights:
        m.back()
    source, target = group.sequences
    assert source.num_computed > target.num_scheduled >= 16
    assert target.num_computed == target.num_scheduled, "or it keeps blocks that its window has left behind"


def test_prompt_logprobs_of_an_aborted_request_are_not_told() -> None:
    m = Machine()
    m.add(3, prompt_logprobs=0, request_id="a")
    m.plan()
    m.scheduler.abort("a")
    m.add(3, request_id="a")
    result = m.worker.run(m.flights.popleft(), m.rng, 0.0, 0.0)
    result.prompt_logprobs = {0: "of the first a"}
    assert m.scheduler.update(result).prompt_entries == []


def test_aborted_requests_leave_nothing_in_the_queue() -> None:
    m = Machine(rows=1)
    m.add(4)
    m.steps(1)
    first = m.add(4)  # it holds up the others
    for _ in range(1000):
        m.scheduler.abort(m.add(1).request_id)
    assert m.scheduler.num_waiting == 1 and len(m.scheduler._queue._queues[first.client_number]) < 100
    m.finish()
    assert m.answers_are_right(first)


def test_the_budget_of_a_group_that_is_preempted_goes_to_others() -> None:
    m = Machine(5, budget=4)
    low = m.add(5, n=4, max_tokens=4, priority=1)
    m.steps(1)
    high = m.add(8, max_tokens=4)
    m.steps(1)
    assert high.sequences[0].num_computed == 3 and m.kv.pool.num_free == 2
    output = m.plan()
    assert low.num_preemptions == 1
    assert output is not None and by_row(m, output) == {high.request_id: 4}
    m.finish()
    assert m.answers_are_right(low, high)
