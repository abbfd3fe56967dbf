"""The tensor-parallel group that layers are given when they are built.

`ParallelGroup` is the group of one: its collectives return their argument. A group of several ranks is a subclass with
the same three members and real collectives. Layers divide their shapes by `size` and know nothing else about it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ParallelGroup:
    """`rank` of `size` processes that share every layer."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: "Tensor") -> "Tensor":
        """The sum of every rank's `x`, on every rank; may overwrite `x`."""
        assert self.size == 1, "a group of several ranks needs a subclass with real collectives"
        return x

    def all_gather(self, x: "Tensor", dim: int) -> "Tensor":
        """Every rank's `x` joined along `dim` in rank order, on every rank."""
        assert self.size == 1, "a group of several ranks needs a subclass with real collectives"
        return x

    def share(self, count: int, what: str) -> int:
        """`count` divided by the number of ranks. Raises ConfigError, naming `what`, if it does not divide."""
        if count % self.size:
            raise ConfigError(f"{what} {count} cannot be shared evenly by {self.size} tensor-parallel ranks.")
        return count // self.size
