"""What changes logits before a draw: masks, bias and penalties. It knows nothing of temperature, truncation or draws.

Each function edits logits_MV in place for the entries that use it, and costs nothing for the others. Ids are added with
-inf where a token is banned, so that masks and bias are one scatter.

Shape legend: M = entries, V = vocabulary, P = entries that use the thing, L = known tokens, R = rows, B, W = banned words.
"""

import numpy as np
import torch
from torch import Tensor

from quire.sampling.state import SamplingState

_BANNED = float("-inf")


def apply_allowed(logits_MV: Tensor, state: SamplingState, rows_M: np.ndarray, entries: np.ndarray) -> None:
    """Ban all but allowed_token_ids, for the entries whose rows have such."""
    for i in entries:
        logits_MV[i].masked_fill_(state.extras[rows_M[i]].forbidden_V, _BANNED)


def apply_edits(
    logits_MV: Tensor,
    state: SamplingState,
    rows_M: np.ndarray,
    positions_M: np.ndarray,
    token_ids_RL: Tensor,
    entries: np.ndarray,
) -> None:
    """Bad words, stop tokens before min_tokens, then logit bias. Entries: the ones whose rows have any of these.

    As in vLLM a bad word counts in the output only: one that began in the prompt may be completed.
    """
    which, ids, values = [], [], []
    for i in entries:
        extras = state.extras[rows_M[i]]
        num_output = int(positions_M[i] - state.prompt_len_R[rows_M[i]])
        words = extras.banned_words
        if words is not None:
            tail_at_W = torch.arange(-words.prefix_BW.shape[1], 0, device=state.device) + int(positions_M[i])
            tail_W = token_ids_RL[int(rows_M[i])].index_select(0, tail_at_W.clamp_(min=0))
            hit_B = ((words.prefix_BW == tail_W) | (words.prefix_BW < 0)).all(-1) & (words.prefix_len_B <= num_output)
            # By adding, since two words may end in the same token and only one of them be hit.
            ban_B = torch.zeros(len(hit_B), dtype=logits_MV.dtype, device=state.device).masked_fill_(hit_B, _BANNED)
            logits_MV[i].index_add_(0, words.last_B, ban_B)
        for edit_ids, edit_values in (
            (extras.stop_ids if num_output < extras.min_tokens else extras.stop_ids[:0], None),
            (extras.bias_ids, extras.bias),
        ):
            which.append(np.full(len(edit_ids), i, np.int64))
            ids.append(edit_ids)
            values.append(np.full(len(edit_ids), _BANNED, np.float32) if edit_values is None else edit_values)
    index = torch.from_numpy(np.stack((np.concatenate(which), np.concatenate(ids)))).to(state.device)
    value = torch.from_numpy(np.concatenate(values)).to(state.device)
    logits_MV.index_put_((index[0], index[1]), value, accumulate=True)


def apply_repetition(logits_PV: Tensor, token_ids_PL: Tensor, position_P: Tensor, penalty_P: Tensor) -> None:
    """Divide positive logits of tokens in prompt or output by the penalty, multiply negative ones (CTRL, Keskar et al.
    2019, section 4.1, with the sign rule of transformers).

    token_ids_PL: int64, known before position_P (int64, at least 1), anything after it. penalty_P: float32.
    """
    known_PL = torch.arange(token_ids_PL.shape[1], device=logits_PV.device) < position_P[:, None]
    # A duplicate writes the same value again, so what is unknown stands in as the first token once more.
    ids_PL = torch.where(known_PL, token_ids_PL, token_ids_PL[:, :1])
    logit_PL = logits_PV.gather(1, ids_PL)
    penalised_PL = torch.where(logit_PL < 0, logit_PL * penalty_P[:, None], logit_PL / penalty_P[:, None])
    logits_PV.scatter_(1, ids_PL, penalised_PL)


def apply_counts(
    logits_PV: Tensor,
    token_ids_PL: Tensor,
    prompt_len_P: Tensor,
    position_P: Tensor,
    frequency_P: Tensor,
    presence_P: Tensor,
) -> None:
    """logit -= frequency * count + presence * (count > 0), count = how often the token is in the output (OpenAI's API
    reference). token_ids_PL: int64, output = [prompt_len, position). The rest float32."""
    at_L = torch.arange(token_ids_PL.shape[1], device=logits_PV.device)
    output_PL = (at_L >= prompt_len_P[:, None]) & (at_L < position_P[:, None])
    ids_PL = torch.where(output_PL, token_ids_PL, 0)
    count_PV = torch.zeros_like(logits_PV).scatter_add_(1, ids_PL, output_PL.to(logits_PV.dtype))
    logits_PV -= frequency_P[:, None] * count_PV + presence_P[:, None] * (count_PV > 0)
