"""What happened to a request inside the scheduler, so that it can be told why it took its time.

Counts of steps and tokens only; who writes it has no clock. Does not know text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from quire.core.preemption import Cause, Preemption, Reason


class Shortage(Enum):
    """What a group waits for. The list is open: later kinds of work have resources of their own."""

    BLOCKS = "blocks"
    BUDGET = "budget"
    ROWS = "rows"
    IN_FLIGHT = "in flight"  # a step or a transfer that still works on it has not come back
    LENGTH = "length"  # longer than max_model_len


@dataclass(frozen=True, slots=True)
class PreemptionNote:
    """One preemption: at which step, what for, which way and why; what it cost. `explanation` is a sentence's end."""

    step: int
    cause: Cause
    way: Preemption
    reason: Reason
    explanation: str
    num_blocks: int
    num_lost_tokens: int  # computed tokens that are to be computed again


@dataclass(frozen=True, slots=True)
class PrefixNote:
    """What a request found when it was first admitted: `num_tokens` of `num_prompt_tokens`, in `blocks` of the first cache
    group. From there on nothing fits: at that position it has `token`, where cached blocks have `cached_tokens` (a few of
    them; none where nothing is cached beyond). `from_fork`: it shares the blocks of a running request."""

    num_prompt_tokens: int
    num_tokens: int
    blocks: list[int]
    from_fork: bool
    token: int | None
    cached_tokens: list[int]


@dataclass(slots=True)
class Journal:
    """Of one request. Steps are the scheduler's; `waited` counts those in which it was the first in the queue, by what was
    missing, `num_steps_behind` those in which others were before it."""

    added_step: int = 0
    admitted_step: int | None = None
    waited: Counter[Shortage] = field(default_factory=Counter)
    prefix: PrefixNote | None = None
    preemptions: list[PreemptionNote] = field(default_factory=list)
    num_copies: int = 0
    num_swapped_blocks: int = 0
    num_recomputed_tokens: int = 0

    def num_steps_waited(self, now: int) -> int:
        """Until it was first admitted, or until step `now`."""
        return (now if self.admitted_step is None else self.admitted_step) - self.added_step

    def num_steps_behind(self, now: int) -> int:
        return max(self.num_steps_waited(now) - sum(self.waited.values()), 0)
