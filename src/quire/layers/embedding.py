"""Tokens into vectors, and vectors into logits.

Shapes: T tokens, M rows whose logits are wanted, H hidden size, V vocabulary.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from quire.layers.context import BuildContext
from quire.layers.slots import WeightSlot, empty_parameter


class Embedding(nn.Module):
    """The token table, whole on every rank: a lookup is no work to share, and a tied head takes its rows from it."""

    def __init__(self, vocab_size: int, hidden_size: int, build: BuildContext) -> None:
        super().__init__()
        self.group = build.group
        self.kernels = build.kernels
        self.weight = empty_parameter(vocab_size, hidden_size, dtype=build.dtype, device=build.device)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        """int32 or int64 [T], each id below V -> [T, H], a new tensor."""
        return self.kernels.embed(input_ids_T, self.weight)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{path}.weight", self.weight, self.group)


class LMHead(nn.Module):
    """Hidden states into logits over the vocabulary, whose rows are split over the ranks.

    `tied_to` is the embedding whose table is also the head's (tie_word_embeddings), or None for a table of its own.
    """

    def __init__(self, vocab_size: int, hidden_size: int, build: BuildContext, *, tied_to: Embedding | None) -> None:
        super().__init__()
        self.group = build.group
        share = build.group.share(vocab_size, "vocab_size")
        self.weight: Tensor
        self.is_tied = tied_to is not None
        if tied_to is None:
            self.weight = empty_parameter(share, hidden_size, dtype=build.dtype, device=build.device)
        else:
            # A view and no parameter of this module: it has no slot, so that the table is loaded once.
            self.weight = tied_to.weight.detach()[build.group.rank * share : (build.group.rank + 1) * share]

    def forward(self, hidden_MH: Tensor, *, fp32: bool = True) -> Tensor:
        """[M, H] -> [M, V] in fp32, or as it was computed: the same numbers in the model's dtype."""
        logits_MV = self.group.all_gather(F.linear(hidden_MH, self.weight), dim=-1)
        return logits_MV.float() if fp32 else logits_MV

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        if not self.is_tied:
            yield WeightSlot(f"{path}.weight", self.weight, self.group, shard_dim=0)
