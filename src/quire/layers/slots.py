"""Where the tensors of a checkpoint go: `WeightSlot`s, which every layer with weights declares by `weight_slots`.

A fused layer declares one slot for each tensor that it is fused of, as views into the one buffer:

    model.layers.0.self_attn.qkv_proj.weight    rows [0, Q)        <- model.layers.0.self_attn.q_proj.weight
                                                rows [Q, Q+K)      <- model.layers.0.self_attn.k_proj.weight
                                                rows [Q+K, Q+2K)   <- model.layers.0.self_attn.v_proj.weight

This module knows no file format; `quire.worker.weights` fills the slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quire.parallel import ParallelGroup


@dataclass(frozen=True)
class WeightSlot:
    """One checkpoint tensor's place in the model.

    `target` is a view into a parameter; filling it fills the model. Where `shard_dim` is not None, the checkpoint's
    tensor is `group.size` times as large along that dimension, and `target` holds this rank's share.
    `dummy_value` is what random weights use here instead of noise (1.0 in norms).
    """

    name: str
    target: Tensor
    group: ParallelGroup
    shard_dim: int | None = None
    dummy_value: float | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        shape = list(self.target.shape)
        if self.shard_dim is not None:
            shape[self.shard_dim] *= self.group.size
        return tuple(shape)

    @property
    def share(self) -> tuple[slice, ...]:
        """This rank's part of the checkpoint's tensor, as an index."""
        index = [slice(0, length) for length in self.target.shape]
        if self.shard_dim is not None:
            length = self.target.shape[self.shard_dim]
            index[self.shard_dim] = slice(self.group.rank * length, (self.group.rank + 1) * length)
        return tuple(index)


def weight_slots(model: nn.Module) -> Iterator[WeightSlot]:
    """All slots of a model, in the order of its layers. Together they cover every parameter exactly once."""
    for path, module in model.named_modules():
        declare = getattr(module, "weight_slots", None)
        if declare is not None:
            yield from declare(path)


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter without gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
