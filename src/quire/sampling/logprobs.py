"""Log probabilities of tokens and of their likeliest rivals, from raw logits: before penalties, bias and temperature.

It does not know how a token was drawn. Ranks count from 1 and are one more than the number of strictly likelier tokens.

Shape legend: N = positions, V = vocabulary, K = the most alternatives asked for, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEFAULT_PIECE = 128


class RowLogprobs(NamedTuple):
    """Of one drawn token: index 0 is the token itself, then the top k by falling probability (it may be there again)."""

    token_ids: np.ndarray  # [k + 1] int64
    logprobs: np.ndarray  # [k + 1] float32
    ranks: np.ndarray  # [k + 1] int64: its own, then 1 to k


class PromptLogprobs(NamedTuple):
    """Like RowLogprobs for N positions at once: [N, k + 1] arrays."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


@dataclass
class LogprobsTensors:
    """On the device: column 0 the chosen token, columns 1 to K the likeliest. Reading it on the host waits for the device.

    token_ids_NK1: int64. logprobs_NK1: float32. rank_N: int64, of the chosen token.
    """

    token_ids_NK1: Tensor
    logprobs_NK1: Tensor
    rank_N: Tensor

    def to_host(self) -> PromptLogprobs:
        token_ids = self.token_ids_NK1.cpu().numpy()
        ranks = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int64), token_ids.shape).copy()
        ranks[:, 0] = self.rank_N.cpu().numpy()
        return PromptLogprobs(token_ids, self.logprobs_NK1.cpu().numpy(), ranks)


def gather_logprobs(logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobsTensors:
    """log_softmax of float32 logits_NV (left as they are) at chosen_N (int64) and at the k likeliest tokens."""
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    chosen_N1 = logprobs_NV.gather(1, chosen_N[:, None])
    rank_N = (logprobs_NV > chosen_N1).sum(-1) + 1
    if k == 0:
        return LogprobsTensors(chosen_N[:, None], chosen_N1, rank_N)
    top_NK, top_ids_NK = logprobs_NV.topk(min(k, logprobs_NV.shape[1]), dim=-1)
    return LogprobsTensors(torch.cat((chosen_N[:, None], top_ids_NK), 1), torch.cat((chosen_N1, top_NK), 1), rank_N)


def prompt_logprobs(
    hidden_ND: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
    target_ids_N: Tensor,
    k: int,
    piece: int = DEFAULT_PIECE,
) -> PromptLogprobs:
    """Log probabilities of the tokens that follow each of N positions, in memory for `piece` positions of logits.

    hidden_ND: the model's last hidden states. compute_logits: [n, D] -> [n, V] of any float dtype. target_ids_N: int64,
    the token after each position. k: alternatives, -1 for the whole vocabulary. Returns host arrays of [N, k + 1].
    """
    assert piece > 0
    parts = []
    for start in range(0, len(hidden_ND), piece):
        logits_nV = compute_logits(hidden_ND[start : start + piece]).float()
        top = logits_nV.shape[1] if k < 0 else k
        # To the host at once: what stays is K wide, the logits of this piece go.
        parts.append(gather_logprobs(logits_nV, target_ids_N[start : start + piece], top).to_host())
    if not parts:
        width = max(k, 0) + 1
        return PromptLogprobs(
            np.empty((0, width), np.int64), np.empty((0, width), np.float32), np.empty((0, width), np.int64)
        )
    return PromptLogprobs(*map(np.concatenate, zip(*parts)))
