"""What an attention backend is: checked once per layer kind, planned once per step, run once per layer.

Knows the shape of a step's batch and of a layer. Does not know schedulers, requests or model families.

Letters of shapes: T tokens, N query heads, K key/value heads, D head size, S sequences (in the cache's shape, the last S: the
slots of a block), B blocks. The cache's layout is in `quire.kernels`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.errors import ConfigError


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes; raises ConfigError where that makes no sense."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Multiplies q k^T, usually head_size ** -0.5."""
    window: int | None = None
    """A query at position p sees keys p - window + 1 .. p (as Mistral's in transformers); None: all up to p."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""
    causal: bool = True
    kv_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_size) < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(f"query heads must be a multiple of key/value heads, all positive: {self}")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ConfigError(f"a window must be positive and causal: {self}")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap must be positive: {self}")


@dataclass(frozen=True)
class AttentionBatch:
    """The flat batch of one step, for the layers of one cache group.

    The query tokens of sequence s are the flat indices query_start_loc[s] .. query_start_loc[s + 1] - 1, at positions
    seq_len - query_len .. seq_len - 1. Its key at position p lies in block block_tables[s, p // block_size].

    Example, block_size 4: a sequence with 8 tokens in the cache decodes its 9th, and a prompt of 3 tokens begins:
        query_start_loc [0, 1, 4], seq_lens [9, 3], block_tables [[5, 2, 7], [4, 0, 0]], slots [28, 16, 17, 18],
        max_query_len 3, max_seq_len 9.
    """

    query_start_loc_S1: Tensor
    """int32 [S + 1], contiguous."""
    seq_lens_S: Tensor
    """int32 [S], contiguous: tokens of each sequence in the cache once this step's are written."""
    block_tables_SB: Tensor
    """int32 [S, at least the most blocks of a sequence], contiguous, padded with the null block 0."""
    slots_T: Tensor
    """int32 or int64 [T]: where this step's keys and values go, block * block_size + offset; negative: nowhere."""
    block_size: int
    max_query_len: int
    max_seq_len: int
    query_start_loc_host_S1: np.ndarray | None = None
    """The same numbers on the host, of any integer type, for backends that plan there; None: they wait for the device's."""
    seq_lens_host_S: np.ndarray | None = None


@dataclass(frozen=True)
class Plan:
    """What a backend prepared for one step and one cache group; backends add to it what they need."""

    batch: AttentionBatch


class AttentionBackend(ABC):
    """One way to compute attention; holds no state of a step."""

    name: str

    @abstractmethod
    def check(self, spec: AttentionSpec) -> None:
        """Raises ConfigError if this backend can't do such a layer. Called once per layer, when a model is built."""

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> Plan:
        """Prepares a step; once per cache group. Its layers may differ in spec (window, scale) and share the plan."""

    @abstractmethod
    def run(
        self, plan: Plan, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Writes k and v into the batch's slots of kv (in place), then returns the attention of q: o [T, N, D], q's dtype.

        q, k and v may be strided views whose last dimension is contiguous; kv is one layer's view of the pool, of
        dtype spec.kv_dtype. Rows of o that belong to no sequence are undefined.
        """
