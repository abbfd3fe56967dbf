"""How beams may go on: the likeliest next tokens of each, with what their scores add up from.

    logits -> log_softmax -> masks, bias and penalties -> top K

Penalties apply to log probabilities here, where a draw applies them to logits: that is transformers' order for beam search.
The device picks candidates, K of each beam, so that the host never sees a vocabulary. Does not know which of them are kept.

Shape legend: P = beams of the step, V = vocabulary, K = candidates, R = rows, L = max_model_len.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.core.step import Candidates
from quire.sampling.sampler import edit_logits
from quire.sampling.state import SamplingState, Use


@torch.inference_mode()
def beam_candidates(
    logits_PV: Tensor,
    state: SamplingState,
    rows_P: np.ndarray,
    positions_P: np.ndarray,
    token_ids_RL: Tensor,
) -> list[Candidates]:
    """For each beam its `state.num_candidates_R` likeliest tokens, best first; arguments as for `Sampler.sample`."""
    logprobs_PV = torch.log_softmax(logits_PV, dim=-1)
    uses_P = state.beam_uses_R[rows_P]
    scores_PV = logprobs_PV
    if int(np.bitwise_or.reduce(uses_P)) & (Use.REPETITION | Use.COUNTS | Use.EDIT | Use.ALLOWED):
        scores_PV = logprobs_PV.clone()
        edit_logits(scores_PV, state, rows_P, positions_P, token_ids_RL, uses_P)
    counts_P = np.minimum(state.num_candidates_R[rows_P], logits_PV.shape[1])
    top_PK, ids_PK = scores_PV.topk(int(counts_P.max()), dim=-1)
    top, ids = top_PK.cpu().numpy(), ids_PK.cpu().numpy()
    found = [Candidates(ids[p, :count], top[p, :count]) for p, count in enumerate(counts_P.tolist())]
    for p in np.flatnonzero(uses_P & Use.LOGPROBS).tolist():
        _add_logprobs(found[p], logprobs_PV[p], int(state.num_logprobs_R[rows_P[p]]))
    return found


def _add_logprobs(candidates: Candidates, logprobs_V: Tensor, k: int) -> None:
    """What the raw distribution says of the candidates, and of the `k` likeliest tokens."""
    own_K = logprobs_V[torch.from_numpy(candidates.token_ids).to(logprobs_V.device)]
    rising_V = logprobs_V.sort().values
    rank_K = len(rising_V) - torch.searchsorted(rising_V, own_K.contiguous(), right=True) + 1
    top_k, ids_k = logprobs_V.topk(k)
    candidates.logprobs, candidates.ranks = own_K.cpu().numpy(), rank_K.cpu().numpy()
    candidates.top_ids, candidates.top_logprobs = ids_k.cpu().numpy(), top_k.cpu().numpy()
