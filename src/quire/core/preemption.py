"""How a group that must make room is preempted: a policy object, asked once for each victim."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from quire.core.sequence import RequestGroup


class Preemption(Enum):
    RECOMPUTE = "recompute"  # forget its blocks; compute its tokens again
    SWAP = "swap"  # move its blocks to host memory


class PreemptionPolicy(Protocol):
    def choose(self, group: RequestGroup, num_blocks: int) -> Preemption:
        """`num_blocks` is what the group holds alone or with others. Where swapping is chosen and the host has no room, the
        group is recomputed."""
        ...


class Always:
    """One way for every group."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def choose(self, group: RequestGroup, num_blocks: int) -> Preemption:
        return self.preemption


class SwapForks:
    """Recompute one sequence, whose tokens a single prefill brings back; swap a group of several.

    Recomputing a group of n costs n answers' tokens and, at first, the sharing that its forks had built up (Kwon et al.,
    SOSP 2023, section 4.5, swap groups together for that reason).
    """

    def choose(self, group: RequestGroup, num_blocks: int) -> Preemption:
        return Preemption.SWAP if len(group.live) > 1 else Preemption.RECOMPUTE
