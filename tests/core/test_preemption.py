from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from quire.core.preemption import (
    Always,
    CheaperOf,
    Preemption,
    Rate,
    Reason,
    ResumeGuard,
    SwapForks,
    VictimFacts,
    blocks_ahead,
    decide,
    recompute_tokens,
)

MB = 10**6


def victim(
    num_sequences: int = 1, blocks: int = 10, tokens: int = 160, free: int = 100, whole: bool = True
) -> VictimFacts:
    return VictimFacts(num_sequences, blocks, tokens, free, whole)


class TestPoliciesThatDoNotWeigh:
    def test_always_choose_the_same(self) -> None:
        for preemption in Preemption:
            choice = decide(Always(preemption), victim())
            assert (choice.preemption, choice.reason) == (preemption, Reason.POLICY)

    def test_swap_forks(self) -> None:
        assert decide(SwapForks(), victim(1)).preemption is Preemption.RECOMPUTE
        assert decide(SwapForks(), victim(2)).preemption is Preemption.SWAP


class TestWhatNoPolicyCanDo:
    def test_swap_into_a_full_host(self) -> None:
        choice = decide(Always(Preemption.SWAP), victim(blocks=10, free=9))
        assert (choice.preemption, choice.reason) == (Preemption.RECOMPUTE, Reason.SWAP_SPACE_FULL)
        assert choice.explanation == "recompute, as its 10 blocks find 9 free in swap space"
        assert decide(Always(Preemption.SWAP), victim(blocks=10, free=10)).preemption is Preemption.SWAP

    def test_swap_a_part_of_a_group(self) -> None:
        choice = decide(Always(Preemption.SWAP), victim(whole=False))
        assert (choice.preemption, choice.reason) == (Preemption.RECOMPUTE, Reason.GROUP_NOT_WHOLE)

    def test_a_full_host_is_no_reason_for_who_recomputes_anyway(self) -> None:
        assert decide(Always(Preemption.RECOMPUTE), victim(free=0)).reason is Reason.POLICY


class TestCheaperOf:
    def test_weighs_bytes_over_the_bus_against_tokens_over_the_prefill_rate(self) -> None:
        policy = CheaperOf(2 * MB, bus_bytes_per_s=10e9, prefill_tokens_per_s=5000, transfer_fixed_s=1e-3)
        assert policy.swap_s(10) == pytest.approx(2 * (1e-3 + 20e6 / 10e9))  # 6 ms
        assert policy.recompute_s(160) == pytest.approx(32e-3)
        choice = decide(policy, victim(blocks=10, tokens=160))
        assert (choice.preemption, choice.reason) == (Preemption.SWAP, Reason.SWAP_CHEAPER)
        assert (
            choice.explanation
            == "swap, as moving 10 blocks out and in takes 6.0 ms, computing 160 tokens again 32.0 ms"
        )
        choice = decide(policy, victim(blocks=10, tokens=29))
        assert (choice.preemption, choice.reason) == (Preemption.RECOMPUTE, Reason.RECOMPUTE_CHEAPER)

    def test_follows_what_is_measured(self) -> None:
        policy = CheaperOf(2 * MB)
        assert decide(policy, victim()).preemption is Preemption.SWAP
        for _ in range(5):
            policy.note_transfer(20 * MB, 1.0)  # a slow bus
        assert policy.bus_bytes_per_s.value == pytest.approx(20e6, rel=0.01)
        assert decide(policy, victim()).preemption is Preemption.RECOMPUTE
        for _ in range(5):
            policy.note_prefill(10, 1.0)  # and a slower processor
        assert decide(policy, victim()).preemption is Preemption.SWAP

    def test_takes_the_fixed_cost_from_short_transfers(self) -> None:
        policy = CheaperOf(MB, transfer_fixed_s=1e-3)
        policy.note_transfer(MB, 2e-3)
        assert policy.bus_bytes_per_s.value == pytest.approx(1e9)
        policy = CheaperOf(MB, transfer_fixed_s=1e-3)
        policy.note_transfer(MB, 0.5e-3)  # faster than the fixed cost: no infinite rate
        assert policy.bus_bytes_per_s.value == pytest.approx(20e9)

    def test_is_right_most_times_on_a_noisy_machine(self) -> None:
        rng, policy = np.random.default_rng(1), CheaperOf(MB, transfer_fixed_s=0)
        bus, prefill, right = 3e9, 800.0, 0
        for _ in range(300):
            policy.note_transfer(50 * MB, 50 * MB / bus * rng.lognormal(0, 0.2))
            policy.note_prefill(500, 500 / prefill * (rng.lognormal(0, 0.2) if rng.random() > 0.05 else 20))
            facts = victim(blocks=int(rng.integers(1, 500)), tokens=int(rng.integers(1, 500)), free=1000)
            truth = 2 * facts.num_blocks * MB / bus < facts.num_recompute_tokens / prefill
            right += (decide(policy, facts).preemption is Preemption.SWAP) == truth
        assert right >= 285


class TestRate:
    def test_is_the_default_before_any_measurement(self) -> None:
        rate = Rate(42.0)
        for nonsense in (0.0, -1.0, math.nan, math.inf):
            rate.note(nonsense, 1.0)
            rate.note(1.0, nonsense)
        assert rate.value == 42.0 and rate.num_measured == 0

    def test_takes_the_first_measurement_at_once(self) -> None:
        rate = Rate(42.0)
        rate.note(100, 1)
        assert rate.value == 100

    def test_gets_over_a_slow_start(self) -> None:
        rate = Rate(42.0)
        rate.note(1, 1)  # everything is loaded in the first step
        for _ in range(3):
            rate.note(1000, 1)
        assert rate.value == 1000

    def test_does_not_see_two_outliers(self) -> None:
        rate = Rate(1.0)
        for seconds in (1, 1, 1, 1, 1, 100, 0.01, 1, 1, 1):
            rate.note(100, seconds)
            assert rate.value == pytest.approx(100)

    def test_follows_a_change(self) -> None:
        rate = Rate(1.0)
        for _ in range(20):
            rate.note(100, 1)
        for _ in range(12):
            rate.note(100, 2)
        assert rate.value == pytest.approx(50, rel=0.05)


class TestTokensToRecompute:
    NONE = np.zeros(20, dtype=np.bool_)

    @staticmethod
    def stays(*blocks: int) -> np.ndarray:
        return np.isin(np.arange(20), blocks)

    def test_of_one_sequence_are_all(self) -> None:
        assert recompute_tokens([np.array([5, 6, 7])], [40], 16, self.NONE) == 40

    def test_count_shared_blocks_once(self) -> None:
        tables = [np.array([5, 6, 7]), np.array([5, 6, 8])]
        assert recompute_tokens(tables, [40, 45], 16, self.NONE) == 53
        assert recompute_tokens([*tables, np.array([5, 6, 7])], [40, 45, 39], 16, self.NONE) == 53

    def test_leave_out_what_stays_cached(self) -> None:
        tables = [np.array([5, 6, 7]), np.array([5, 6, 8])]
        assert recompute_tokens(tables, [40, 45], 16, self.stays(5)) == 37
        assert recompute_tokens(tables, [40, 45], 16, self.stays(5, 6)) == 21
        assert recompute_tokens(tables, [40, 45], 16, self.stays(6)) == 53
        assert recompute_tokens([np.array([5])], [16], 16, self.stays(5)) == 0
        assert recompute_tokens([np.array([5, 0, 0])], [16], 16, self.NONE) == 16

    def test_of_nothing_are_none(self) -> None:
        assert recompute_tokens([np.zeros(0, dtype=np.int32)], [0], 16, self.NONE) == 0


class TestResumeGuard:
    def test_asks_nothing_of_new_groups(self) -> None:
        assert ResumeGuard().horizon("new", is_alone=False) == 0

    def test_doubles_for_who_is_preempted_again_soon(self) -> None:
        guard, step, seen = ResumeGuard(16, 100), 0, []
        for run in (5, 5, 20, 40, 1, 101, 3):
            guard.note_preempted("a", step)
            seen.append(guard.horizon("a", is_alone=False))
            step += 50  # waits
            guard.note_resumed("a", step)
            step += run
        assert seen == [16, 32, 64, 100, 100, 100, 16]
        assert guard.horizon("b", is_alone=False) == 0

    def test_lets_in_who_would_be_alone(self) -> None:
        guard = ResumeGuard()
        guard.note_preempted("a", 0)
        assert guard.horizon("a", is_alone=True) == 0

    def test_forgets(self) -> None:
        guard = ResumeGuard()
        guard.note_preempted("a", 0)
        guard.forget("a")
        guard.forget("a")
        guard.note_resumed("a", 1)
        assert guard.num_known == 0 and guard.horizon("a", is_alone=False) == 0


class TestBlocksAhead:
    def test_equal_those_taken_one_by_one(self) -> None:
        rng = random.Random(1)
        for _ in range(300):
            size, tokens = rng.choice([1, 4, 16]), rng.randint(1, 60)
            total, horizon = tokens + rng.randint(0, 40), rng.randint(0, 40)
            have = -(-tokens // size) + rng.choice([-1, 0])
            last = min(tokens + horizon, total - 1)
            needed = {position // size for position in range(last)} - set(range(have))
            (ahead,) = blocks_ahead(np.array([tokens]), np.array([total]), np.array([have]), horizon, size)
            assert ahead == len(needed)


@dataclass(eq=False)
class Job:
    number: int
    prompt: int
    answer: int
    done: int = 0

    @property
    def blocks(self) -> int:
        return -(-(self.prompt + self.done) // 16)


class TestNoThrash:
    """A pool for few, a queue of many; decoding only, and a step for 256 tokens of prefill."""

    @staticmethod
    def run(guard: ResumeGuard | None, seed: int) -> tuple[Counter[int], int, int]:
        """Preemptions of each, tokens recomputed, steps until all is done."""
        rng = random.Random(seed)
        waiting = [Job(i, rng.randint(10, 200), rng.randint(20, 300)) for i in range(60)]
        running: list[Job] = []
        pool, preempted, lost = 80, Counter[int](), 0
        for step in itertools.count():
            prefill = 0
            while waiting and prefill < 256:
                waiting.sort(key=lambda job: job.number)
                job = waiting[0]
                horizon = guard.horizon(str(job.number), not running) if guard else 0
                jobs = [*running, job]
                tokens, total, have = (
                    np.array(column)
                    for column in zip(*((j.prompt + j.done, j.prompt + j.answer, j.blocks) for j in jobs))
                )
                head = int(blocks_ahead(tokens, total, have, horizon, 16).sum())
                if running and sum(j.blocks for j in jobs) + head > pool:
                    break
                running.append(waiting.pop(0))
                prefill += job.prompt + job.done
                if guard:
                    guard.note_resumed(str(job.number), step)
            for job in running:
                job.done += 1
            running = [job for job in running if job.done < job.answer]
            while sum(job.blocks for job in running) > pool:
                running.sort(key=lambda job: job.number)
                gone = running.pop()
                preempted[gone.number] += 1
                lost += gone.prompt + gone.done
                waiting.append(gone)
                if guard:
                    guard.note_preempted(str(gone.number), step)
            if not running and not waiting:
                return preempted, lost, step
        raise AssertionError

    @pytest.mark.parametrize("seed", range(6))
    def test_hardly_anybody_is_preempted_twice(self, seed: int) -> None:
        without, lost_without, steps_without = self.run(None, seed)
        guarded, lost, steps = self.run(ResumeGuard(), seed)
        again, again_without = guarded.total() - len(guarded), without.total() - len(without)
        print(
            f"{again_without} -> {again} of {without.total()} -> {guarded.total()}, {lost_without} -> {lost} tokens lost"
        )
        print(f"{steps_without} -> {steps} steps")
        assert again <= again_without / 2
        assert guarded.total() < without.total() and lost < lost_without
        assert steps <= 1.06 * steps_without
