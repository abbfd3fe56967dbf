from __future__ import annotations

import math

import numpy as np
import pytest

from quire.core.pace import StepPace

MACHINES = {  # seconds of a step, a decoding row, a prefill token, a context token
    "one H100, 8B": (8e-3, 10e-6, 20e-6, 40e-9),
    "a laptop, 260K": (0.3e-3, 15e-6, 8e-6, 3e-9),
    "a laptop, 1B": (50e-3, 2e-3, 3e-3, 1e-6),
    "all in the tokens": (0.0, 1e-3, 1e-3, 0.0),
}
TARGETS = {"one H100, 8B": 30e-3, "a laptop, 260K": 5e-3, "a laptop, 1B": 1.0, "all in the tokens": 0.2}


class Machine:
    """A machine that serves: answers that start and end, and prompts without end."""

    def __init__(self, name: str, seed: int, noise: float = 0.08, hiccups: float = 0.0) -> None:
        self.costs = np.array(MACHINES[name])
        self.target_s = TARGETS[name]
        self.rng = np.random.default_rng(seed)
        self.noise, self.hiccups = noise, hiccups
        self.contexts = self.rng.integers(20, 2000, 32)
        self.slowness = 1.0

    def counts(self) -> tuple[int, int]:
        """Decoding rows and their context, in the next step."""
        self.contexts += 1
        stay = self.rng.random(len(self.contexts)) > 0.02
        fresh = self.rng.integers(20, 2000, self.rng.poisson(0.64))
        self.contexts = np.concatenate([self.contexts[stay], fresh])[:64]
        if not len(self.contexts):
            self.contexts = np.array([100])
        return len(self.contexts), int(self.contexts.sum())

    def seconds(self, decoding: int, prefill: int, context: int) -> float:
        seconds = float(self.costs @ (1, decoding, prefill, context)) * self.slowness
        seconds *= float(self.rng.lognormal(0, self.noise))
        return seconds * (6 if self.rng.random() < self.hiccups else 1)

    def best(self, decoding: int, context: int, ceiling: int) -> float:
        """The prefill that takes exactly the target, without noise."""
        left = self.target_s / self.slowness - float(self.costs @ (1, decoding, 0, context))
        return min(left / self.costs[2], ceiling)


def run(machine: Machine, pace: StepPace, steps: int, ceiling: int = 8192, wishes: float = 1.0) -> np.ndarray:
    """[steps, 3]: seconds, prefill tokens, the best number of them. In a part `wishes` of the steps prompts wait."""
    rows = []
    for _ in range(steps):
        decoding, context = machine.counts()
        budget = pace.prefill_budget(decoding, context, machine.target_s, ceiling)
        prefill = budget if machine.rng.random() < wishes else 0
        seconds = machine.seconds(decoding, prefill, context)
        pace.observe(decoding, prefill, context, seconds)
        rows.append((seconds, prefill, machine.best(decoding, context, ceiling)))
    return np.array(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MACHINES)
class TestOnANoisyMachine:
    def test_steps_stay_within_the_target(self, name: str, seed: int) -> None:
        machine = Machine(name, seed)
        seconds = run(machine, StepPace(), 400)[10:, 0]
        assert np.mean(seconds <= 1.2 * machine.target_s) >= 0.95
        assert np.mean(seconds <= machine.target_s) >= 0.8

    def test_most_of_the_target_is_used(self, name: str, seed: int) -> None:
        _, prefill, best = run(Machine(name, seed), StepPace(), 400)[20:].T
        assert prefill.sum() >= 0.7 * best.sum()

    def test_ten_steps_teach_enough(self, name: str, seed: int) -> None:
        machine = Machine(name, seed)
        _, prefill, best = run(machine, StepPace(), 40)[10:].T
        assert prefill.sum() >= 0.5 * best.sum()

    def test_prompts_that_come_now_and_then_do_no_harm(self, name: str, seed: int) -> None:
        machine = Machine(name, seed)
        seconds, prefill, best = run(machine, StepPace(), 1000, wishes=0.03)[100:].T
        late = seconds > 1.2 * machine.target_s
        assert np.mean(late[prefill > 0]) <= 0.15
        assert np.median((prefill / best)[prefill > 0]) >= 0.4

    def test_hiccups_change_little(self, name: str, seed: int) -> None:
        machine = Machine(name, seed, hiccups=0.02)
        seconds, prefill, best = run(machine, StepPace(), 400)[20:].T
        assert np.mean(seconds <= 1.2 * machine.target_s) >= 0.93  # 2 % of them cannot
        assert prefill.sum() >= 0.6 * best.sum()

    def test_a_slower_machine_is_noticed(self, name: str, seed: int) -> None:
        machine, pace = Machine(name, seed), StepPace()
        machine.target_s *= 2  # so that there is room in it
        run(machine, pace, 200)
        machine.slowness = 2.0
        seconds, prefill, best = run(machine, pace, 200).T
        late = seconds > 1.2 * machine.target_s
        assert late[:20].sum() <= 12
        assert late[20:].mean() <= 0.05
        assert prefill[30:].sum() >= 0.65 * best[30:].sum()
        machine.slowness = 1.0
        _, prefill, best = run(machine, pace, 200).T
        assert prefill[60:].sum() >= 0.65 * best[60:].sum()


class TestBudget:
    def test_is_the_ceiling_where_nobody_decodes(self) -> None:
        assert StepPace().prefill_budget(0, 0, 1e-9, 2048) == 2048

    def test_is_small_before_anything_is_known(self) -> None:
        assert StepPace().prefill_budget(4, 100, 10.0, 2048) == 16

    def test_is_at_least_the_floor_however_late_it_is(self) -> None:
        pace = StepPace(floor=32)
        for _ in range(10):
            pace.observe(8, 64, 1000, 1.0)
        assert pace.prefill_budget(8, 1000, 1e-3, 2048) == 32
        assert pace.prefill_budget(8, 1000, 1e-3, 10) == 10

    def test_at_most_doubles_what_was_tried(self) -> None:
        pace, tried = StepPace(), []
        for _ in range(10):
            tried.append(pace.prefill_budget(1, 10, 100.0, 2048))
            pace.observe(1, tried[-1], 10, 1e-3)
        assert tried == [16, 32, 64, 128, 256, 512, 1024, 2048, 2048, 2048]

    def test_falls_with_rows_and_context(self) -> None:
        machine, pace = Machine("one H100, 8B", 1), StepPace()
        run(machine, pace, 300)
        few, many = (pace.prefill_budget(rows, 500 * rows, 30e-3, 8192) for rows in (4, 64))
        assert few > many


class TestLearning:
    def test_finds_the_costs_of_a_machine_without_noise(self) -> None:
        machine, pace = Machine("one H100, 8B", 1, noise=0.0), StepPace()
        rng = np.random.default_rng(2)
        for _ in range(300):
            counts = int(rng.integers(1, 200)), int(rng.integers(0, 2000)), int(rng.integers(0, 200_000))
            pace.observe(*counts, machine.seconds(*counts))
        np.testing.assert_allclose(pace.costs, machine.costs, rtol=0.05)
        assert pace.predict(10, 100, 1000) == pytest.approx(machine.seconds(10, 100, 1000), rel=0.02)

    def test_gets_over_a_slow_first_step(self) -> None:
        machine, pace = Machine("one H100, 8B", 1), StepPace()
        pace.observe(0, 2048, 0, 20.0)
        _, prefill, best = run(machine, pace, 100).T
        assert prefill[15:].sum() > 0.65 * best[15:].sum()

    def test_does_not_believe_a_step_that_was_far_too_fast(self) -> None:
        machine, pace = Machine("one H100, 8B", 1), StepPace()
        run(machine, pace, 100)
        before = pace.predict(30, 500, 30_000)
        pace.observe(30, 500, 30_000, before / 1000)
        assert pace.predict(30, 500, 30_000) > before / 4

    def test_ignores_nonsense(self) -> None:
        pace = StepPace()
        for seconds in (0.0, -1.0, math.nan, math.inf):
            pace.observe(1, 1, 1, seconds)
        assert pace.num_observed == 0 and not pace.costs.any()

    def test_stays_sound_over_a_long_monotonous_time(self) -> None:
        """Steps that are all alike tell nothing apart; what they don't tell must not drift or blow up."""
        machine, pace = Machine("one H100, 8B", 1), StepPace()
        run(machine, pace, 200)
        before = pace.costs.copy()
        for _ in range(20_000):
            pace.observe(32, 0, 32_000, machine.seconds(32, 0, 32_000))
        assert np.isfinite(pace.costs).all() and (pace.costs >= 0).all()
        assert pace.costs[2] == pytest.approx(before[2], rel=0.3)
        assert pace.predict(32, 0, 32_000) == pytest.approx(machine.costs @ (1, 32, 0, 32_000), rel=0.1)

    def test_bears_wild_input(self) -> None:
        rng, pace = np.random.default_rng(3), StepPace()
        for _ in range(3000):
            counts = [int(rng.integers(0, 10 ** rng.integers(1, 7))) * int(rng.integers(0, 2)) for _ in range(3)]
            pace.observe(counts[0], counts[1], counts[2], float(10.0 ** rng.uniform(-7, 3)))
            assert np.isfinite(pace.costs).all() and (pace.costs >= 0).all()
            assert 16 <= pace.prefill_budget(1 + counts[0], counts[2], 0.1, 2048) <= 2048
