"""How many prompt tokens a step may read without holding up those who write: learned from what steps took.

    seconds of a step = base + a x decoding rows + b x prefill tokens + c x context tokens

The four costs are fitted to past steps by recursive least squares: relative errors count, so that a step that was held up by
something else has little weight; old steps are forgotten; what past steps do not tell apart stays as it was; no cost is
negative. How far steps spread about the fit is remembered too, and `prefill_budget` keeps their 90th percentile within the
target. A machine that turns twice as slow is met by that percentile after a few steps, and by the fit soon after.

Does not know who runs, the token budget's other uses, or clocks: seconds are passed in. Nor whose prompt is read: that a
chunk far down a long prompt costs more a token is learned as its chunks come back.
"""

from __future__ import annotations

import math

import numpy as np

# How dear a step, a decoding row, a prefill token and a context token are in relation, where nothing is known yet
SHARES = np.array([64.0, 1.0, 1.0, 0.001])
BASE, DECODE, PREFILL, CONTEXT = range(4)


class StepPace:
    """`memory` is about how many steps the fit looks back; `window` how many the spread is taken from, and `quantile` which
    part of them is to stay within a target. `floor` is the least prefill budget: prompts always progress."""

    def __init__(
        self, *, floor: int = 16, memory: int = 25, window: int = 20, quantile: float = 0.9, damping: float = 0.01
    ) -> None:
        assert floor > 0 and memory > 1 and window > 0 and 0 < quantile <= 1 and damping > 0
        self.floor = floor
        self.num_observed = 0
        self.costs = np.zeros(4)  # seconds each: a step, a decoding row, a prefill token, a context token
        self._keep = 1 - 1 / memory
        self._quantile = quantile
        self._damping = damping
        self._gram = np.zeros((4, 4))  # sum of z z^T, faded; z are a step's counts over its seconds
        self._sum = np.zeros(4)  # sum of z
        self._steps = np.zeros((window, 4))  # z of the last ones, in no order
        self._largest = 0  # prefill that was measured
        self._spread = 1.0

    def observe(self, num_decoding: int, num_prefill: int, num_context: int, elapsed_s: float) -> None:
        """A step came back: rows that decoded, prompt tokens read, and context tokens: the sum over all rows of the positions
        before those that it computed. Nonsense (a clock that stood still) is ignored."""
        if not 0 < elapsed_s < math.inf:
            return
        counts = np.array([1.0, num_decoding, num_prefill, num_context])
        if not self.num_observed:
            self.costs = SHARES * (elapsed_s / float(SHARES @ counts))
        # far too fast is as little to be believed as far too slow, but would weigh much
        seconds = max(elapsed_s, float(self.costs @ counts) / 4)
        z = counts / seconds
        self._gram = self._keep * self._gram + z * z[:, None]
        self._sum = self._keep * self._sum + z
        self._steps[self.num_observed % len(self._steps)] = counts / elapsed_s
        self.num_observed += 1
        self._largest = max(self._largest, num_prefill)
        self._fit(counts, max(float(self.costs @ counts), elapsed_s / 100))
        self._spread = self._measure_spread()

    def _fit(self, counts: np.ndarray, seconds: float) -> None:
        """Least squares of 1 - z costs, with a pull towards the costs so far, in units of each cost's likely size: its share
        of the `seconds` of a step with these counts."""
        unit = SHARES * seconds / float(SHARES @ counts)
        gram = self._gram * (unit * unit[:, None])
        gram.flat[::5] += self._damping
        target = self._sum * unit + self._damping * (self.costs / unit)
        solution = np.linalg.solve(gram, target)
        while (solution < 0).any():  # without those that would be negative
            used = solution > 0
            solution[~used] = 0
            solution[used] = np.linalg.solve(gram[np.ix_(used, used)], target[used])
        self.costs = solution * unit

    def _measure_spread(self) -> float:
        """Of the last steps, what the slow ones took over what the fit says."""
        count = min(self.num_observed, len(self._steps))
        share = np.sort(self._steps[:count] @ self.costs)  # what was expected of what was taken, the slow ones first
        return 1 / max(float(share[count - math.ceil(self._quantile * count)]), 1e-9)

    def predict(self, num_decoding: int, num_prefill: int, num_context: int) -> float:
        """Seconds that such a step will take, in the middle. 0 before any was observed."""
        return float(self.costs @ (1.0, num_decoding, num_prefill, num_context))

    def prefill_budget(self, num_decoding: int, num_context: int, target_s: float, ceiling: int) -> int:
        """The most prompt tokens with which a step of `num_decoding` rows over `num_context` tokens stays within `target_s`,
        from `floor` to `ceiling`. All of them if nobody decodes; no more than twice the most that was measured before."""
        if not num_decoding:
            return ceiling
        left_s = target_s / self._spread - self.predict(num_decoding, 0, num_context)
        most = min(2 * max(self._largest, self.floor // 2), ceiling)
        if left_s <= 0:
            most = 0
        elif left_s < most * self.costs[PREFILL]:
            most = int(left_s / self.costs[PREFILL])
        return min(max(most, self.floor), ceiling)
