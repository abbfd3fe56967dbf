"""What a layer is given: once, when the model is built (`BuildContext`), and with every step (`ForwardContext`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.parallel import ParallelGroup

if TYPE_CHECKING:
    from quire.attention.base import AttentionBackend, Plan
    from quire.kernels import Kernels


@dataclass(frozen=True)
class BuildContext:
    """Everything outside the config that decides how a model is built.

    `dtype` is that of weights and activations, `kv_dtype` that of the KV cache (None: the same). `max_model_len` is the
    longest sequence that will be served: the length of the rotary table, and the one length for which dynamic
    scaling is computed.
    """

    dtype: torch.dtype
    device: torch.device
    kernels: "Kernels"
    attention: "AttentionBackend"
    max_model_len: int
    group: ParallelGroup = field(default_factory=ParallelGroup)
    kv_dtype: torch.dtype | None = None


@dataclass
class ForwardContext:
    """What one step brings to the attention layers, indexed by layer.

    `plans[i]` is the backend's plan for layer i's cache group; layers of one group share one plan object.
    `kv[i]` is layer i's view of the pool, [num_blocks, 2, kv_heads, block_size, head_size], written in place.
    `wanted_M`, int32 or int64, are the tokens whose hidden states the step is for, by their places in the batch (None: all): of
    the others the last layer's keys and values are all that anybody will read.
    """

    plans: "Sequence[Plan]"
    kv: Sequence[Tensor]
    wanted_M: Tensor | None = None
