"""The chooser for GPUs: `quire.kernels.triton.sampling` behind the two methods that `Sampler` calls.

Loads Triton, so it is imported where the device is a GPU. Does not know masks and penalties.

Shape legend: M = entries, V = vocabulary, N = entries with log probabilities.
"""

import numpy as np
import torch
from torch import Tensor

from quire.kernels.triton import sampling as kernels
from quire.sampling.logprobs import LogprobsTensors
from quire.sampling.state import SamplingState, Use
from quire.sampling.transfer import to_device

_FLAGS = np.array(
    [
        kernels.RANDOM * bool(uses & Use.RANDOM) + kernels.TRUNCATE * bool(uses & Use.TRUNCATE)
        for uses in range(2 * max(Use))
    ],
    np.int32,
)
"""By a row's uses."""
_DRAW = slice(kernels.SEED_LOW, kernels.BRANCH_HIGH + 1)  # seed and branch, low words first


def write_entries(
    words_M8: np.ndarray, state: SamplingState, rows_M: np.ndarray, positions_M: np.ndarray, uses_M: np.ndarray
) -> None:
    """Writes what the kernels have to know of each entry into int32 [M, kernels.WORDS], zeros: the parameters they find by
    its row."""
    words_M8[:, kernels.ROW] = rows_M
    words_M8[:, kernels.POSITION] = positions_M
    words_M8[:, _DRAW] = state.seed_branch_R2[rows_M].view(np.int32)
    words_M8[:, kernels.FLAGS] = _FLAGS[uses_M]


def entry_words(state: SamplingState, rows_M: np.ndarray, positions_M: np.ndarray, uses_M: np.ndarray) -> np.ndarray:
    """`write_entries` into an array of its own."""
    words_M8 = np.zeros((len(rows_M), kernels.WORDS), np.int32)
    write_entries(words_M8, state, rows_M, positions_M, uses_M)
    return words_M8


class TritonChooser:
    """`sampler.TorchChooser` on a GPU; logits of any float dtype."""

    name = "triton"

    def choose(
        self,
        logits_MV: Tensor,
        state: SamplingState,
        rows_M: np.ndarray,
        positions_M: np.ndarray,
        uses_M: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        words_M8 = to_device(entry_words(state, rows_M, positions_M, uses_M), state.device)
        result_2M = torch.empty((2, len(rows_M)), dtype=torch.int32, device=state.device)
        truncated = bool(np.any(uses_M & Use.TRUNCATE))
        kernels.choose_tokens(logits_MV, words_M8, state.params_RC, result_2M, truncated=truncated)
        return result_2M[0].long(), result_2M[1].to(torch.int8)

    def logprobs(self, logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobsTensors:
        return LogprobsTensors(*kernels.logprobs(logits_NV, chosen_N, k))
