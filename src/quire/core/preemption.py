"""How a group that must make room is preempted, why, and when it may come back.

A policy is asked once for each victim: move its blocks to host memory, or forget them and compute its tokens again. `CheaperOf`
weighs the seconds that either takes, by rates that are measured as the engine runs:

    swap       2 x (fixed + bytes / bus rate)     out and in again; blocks that its sequences share move once
    recompute  tokens / prefill rate              tokens that its sequences share, or that stay cached, are not counted again

`ResumeGuard` keeps a preempted group from coming back into the same shortage. Does not know who the victim is, nor free blocks,
queues, or clocks: times are passed in.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np


class Preemption(Enum):
    RECOMPUTE = "recompute"  # forget its blocks; compute its tokens again
    SWAP = "swap"  # move its blocks to host memory


class Cause(Enum):
    """Why somebody had to make room."""

    OUT_OF_BLOCKS = "out of blocks"  # those that run need more than there are
    FAIRNESS = "fairness"  # for a client that was given much less


class Reason(Enum):
    """Why this way of preempting. The values are labels of a metric."""

    SWAP_CHEAPER = "swap cheaper"
    RECOMPUTE_CHEAPER = "recompute cheaper"
    SWAP_SPACE_FULL = "swap space full"
    GROUP_NOT_WHOLE = "group not whole"  # some of its sequences wait for their source, or for blocks under way
    POLICY = "policy"  # the policy does not weigh


@dataclass(frozen=True, slots=True)
class VictimFacts:
    """What a policy may weigh. Each block and token that several of the group's sequences share counts once."""

    num_sequences: int
    num_blocks: int  # device blocks that it holds, alone or with others: what swapping moves
    num_recompute_tokens: int  # see `recompute_tokens`
    num_free_host_blocks: int
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    preemption: Preemption
    reason: Reason
    explanation: str  # a sentence's end, for the log: "request 7 was preempted (out of blocks): <explanation>"


class PreemptionPolicy(Protocol):
    def decide(self, victim: VictimFacts) -> Choice:
        """Asked for whole groups. Whether the host has room is not its business: `decide` below sees to that."""
        ...

    def note_transfer(self, num_bytes: int, seconds: float) -> None:
        """What moving blocks took, one way."""
        ...

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """What a step took that was mostly prefill."""
        ...


def decide(policy: PreemptionPolicy, victim: VictimFacts) -> Choice:
    """The policy's choice, or recomputing where swapping is impossible."""
    if not victim.is_whole:
        return Choice(
            Preemption.RECOMPUTE, Reason.GROUP_NOT_WHOLE, "recompute, as some of its sequences are still to fork"
        )
    choice = policy.decide(victim)
    if choice.preemption is Preemption.SWAP and victim.num_blocks > victim.num_free_host_blocks:
        explanation = (
            f"recompute, as its {victim.num_blocks} blocks find {victim.num_free_host_blocks} free in swap space"
        )
        return Choice(Preemption.RECOMPUTE, Reason.SWAP_SPACE_FULL, explanation)
    return choice


class _Unmeasured:
    """A policy that asks neither the bus nor the clock."""

    def note_transfer(self, num_bytes: int, seconds: float) -> None: ...

    def note_prefill(self, num_tokens: int, seconds: float) -> None: ...


class Always(_Unmeasured):
    """One way for every group."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def decide(self, victim: VictimFacts) -> Choice:
        return Choice(self.preemption, Reason.POLICY, f"{self.preemption.value}, as for every request")


class SwapForks(_Unmeasured):
    """Recompute one sequence, whose tokens a single prefill brings back; swap a group of several.

    Recomputing a group of n costs n answers' tokens and, at first, the sharing that its forks had built up (Kwon et al.,
    SOSP 2023, section 4.5, swap groups together for that reason).
    """

    def decide(self, victim: VictimFacts) -> Choice:
        if victim.num_sequences > 1:
            return Choice(Preemption.SWAP, Reason.POLICY, f"swap, as {victim.num_sequences} sequences share blocks")
        return Choice(Preemption.RECOMPUTE, Reason.POLICY, "recompute, as it is a single sequence")


class Rate:
    """Something a second, as measured: the median of the last five, smoothed. Two outliers in a row leave no trace, and a real
    change is seen after three. `default` holds until the first measurement."""

    def __init__(self, default: float, gain: float = 0.3) -> None:
        assert default > 0 and 0 < gain <= 1
        self.value = default
        self.num_measured = 0
        self._gain = gain
        self._recent: deque[float] = deque(maxlen=5)

    def note(self, amount: float, seconds: float) -> None:
        """Nonsense (a clock that stood still) is ignored."""
        if not (0 < amount < math.inf and 0 < seconds < math.inf):
            return
        self._recent.append(amount / seconds)
        self.num_measured += 1
        median = statistics.median(self._recent)
        gain = self._gain if self.num_measured > len(self._recent) else 1.0
        self.value += gain * (median - self.value)


class CheaperOf:
    """Whichever takes fewer seconds, out and back.

    `block_bytes` are those of a block over all layers. The defaults are a PCIe bus's and a middling GPU's, for the first
    victims only: `note_transfer` and `note_prefill` replace them.
    """

    def __init__(
        self,
        block_bytes: int,
        *,
        bus_bytes_per_s: float = 10e9,
        prefill_tokens_per_s: float = 5000.0,
        transfer_fixed_s: float = 50e-6,
    ) -> None:
        assert block_bytes > 0 and transfer_fixed_s >= 0
        self.block_bytes = block_bytes
        self.transfer_fixed_s = transfer_fixed_s
        self.bus_bytes_per_s = Rate(bus_bytes_per_s)
        self.prefill_tokens_per_s = Rate(prefill_tokens_per_s)

    def note_transfer(self, num_bytes: int, seconds: float) -> None:
        """One way. Of a very short one, most may be the fixed cost: at least a tenth counts for the bytes."""
        self.bus_bytes_per_s.note(num_bytes, max(seconds - self.transfer_fixed_s, seconds / 10))

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """What a step took that was mostly prefill."""
        self.prefill_tokens_per_s.note(num_tokens, seconds)

    def swap_s(self, num_blocks: int) -> float:
        return 2 * (self.transfer_fixed_s + num_blocks * self.block_bytes / self.bus_bytes_per_s.value)

    def recompute_s(self, num_tokens: int) -> float:
        return num_tokens / self.prefill_tokens_per_s.value

    def decide(self, victim: VictimFacts) -> Choice:
        swap, recompute = self.swap_s(victim.num_blocks), self.recompute_s(victim.num_recompute_tokens)
        blocks = f"moving {victim.num_blocks} blocks out and in takes {1e3 * swap:.1f} ms"
        tokens = f"computing {victim.num_recompute_tokens} tokens again {1e3 * recompute:.1f} ms"
        if swap < recompute:
            return Choice(Preemption.SWAP, Reason.SWAP_CHEAPER, f"swap, as {blocks}, {tokens}")
        return Choice(Preemption.RECOMPUTE, Reason.RECOMPUTE_CHEAPER, f"recompute, as {blocks}, {tokens}")


def recompute_tokens(
    tables: Sequence[np.ndarray], num_tokens: Sequence[int], block_size: int, stays: np.ndarray
) -> int:
    """Tokens that a group's sequences would compute again.

    `tables[i]` [B] are the blocks of sequence i, in a cache group without a window, `num_tokens[i]` how many of its tokens
    they hold; `stays` [num_blocks] bool says which blocks will probably still be found in the prefix cache.

    Example, blocks of 16: tables [5 6 7] and [5 6 8] with 40 and 45 tokens compute 32 + 8 + 13 = 53 tokens; 16 fewer if block
    5 stays. If 6 stays without 5, nothing is saved: a hit has no gaps.
    """
    filled: dict[int, int] = {}
    for table, count in zip(tables, num_tokens):
        blocks = np.asarray(table)[: -(-count // block_size)]
        kept = stays[blocks]
        num_hit = len(kept) if kept.all() else int(np.argmin(kept))
        for index in range(num_hit, len(blocks)):
            block, fill = int(blocks[index]), min(block_size, count - index * block_size)
            filled[block] = max(filled.get(block, 0), fill)
    return sum(filled.values())


@dataclass(slots=True)
class _Return:
    """What `ResumeGuard` knows of one request."""

    horizon: int
    resumed_at: int = 0


class ResumeGuard:
    """How far ahead a preempted group must find room before it comes back, in tokens for each sequence, its own and those that
    run: its *horizon*.

    Coming back as soon as its own tokens fit, it would be the first to go again a block later. The farther it looks, the
    fewer groups run at once: in the simulation of the tests, 32 tokens spare two of three second preemptions, and cost 4 % more
    steps. The horizon is `first` tokens, and twice as many, up to `most`, each time that a group is preempted before it has
    had as many steps; who had them starts over.

        preempted -> 32 -> back, preempted after 5 steps -> 64 -> back, after 40 -> 128 -> back, after 200 -> 32
    """

    def __init__(self, first: int = 32, most: int = 512) -> None:
        assert 0 < first <= most
        self.first = first
        self.most = most
        self._returns: dict[str, _Return] = {}

    @property
    def num_known(self) -> int:
        return len(self._returns)

    def note_preempted(self, request_id: str, step: int) -> None:
        known = self._returns.get(request_id)
        if known is None or step - known.resumed_at > known.horizon:
            self._returns[request_id] = _Return(self.first)
        else:
            known.horizon = min(2 * known.horizon, self.most)

    def note_resumed(self, request_id: str, step: int) -> None:
        if request_id in self._returns:
            self._returns[request_id].resumed_at = step

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._returns.pop(request_id, None)

    def horizon(self, request_id: str, is_alone: bool) -> int:
        """0 for a group that was never preempted, and for one that would run alone: it has to come back some time."""
        known = self._returns.get(request_id)
        return 0 if known is None or is_alone else known.horizon


def blocks_ahead(
    num_tokens: np.ndarray, max_total: np.ndarray, num_blocks: np.ndarray, horizon: int, block_size: int
) -> np.ndarray:
    """Blocks [R] that sequences with `num_tokens` [R] known tokens in `num_blocks` [R] blocks still take until each knows
    `horizon` more, or has its `max_total` [R] tokens (the last of which is never stored)."""
    stored = np.minimum(num_tokens + horizon, max_total - 1)
    return np.maximum(-(-stored // block_size) - num_blocks, 0)
