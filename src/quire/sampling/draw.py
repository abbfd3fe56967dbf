"""Draw one token from each row of probabilities by inverting the cumulative distribution with one uniform number.

The token is the first in vocabulary order whose cumulative probability exceeds u times the row's total. No sort is needed
for that, nor a cumulative sum over the vocabulary: sums of blocks are accumulated in float64, then one block is searched.

    probabilities  .1 .2 | .3 .0 | .4      blocks of two: .3 .3 .4, cumulative .3 .6 1.0
    u = .45                                 the second block is the first above .45; within it .3 + .3 exceeds: token 2

It does not know seeds, nor what truncated the probabilities. A row's result depends on that row alone: every reduction
here runs inside a row, in an order that the number of rows does not change.

Shape legend: M = rows, V = vocabulary, K = whole blocks, B = tokens of a block, C = candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
# Smallest positive float32: a candidate has at least this.
_TINY = 2.0**-149
# Six halvings of some 20 octaves leave a bound within a quarter of the best one.
_NARROWING_STEPS = 6
_NARROWING_MARGIN = 1e-5


def block_sums(probs_MV: Tensor) -> Tensor:
    """Sums of consecutive blocks of BLOCK tokens, the last one shorter: float64 [M, ceil(V / BLOCK)]."""
    head = probs_MV.shape[1] // BLOCK * BLOCK
    sums = []
    if head:
        sums.append(probs_MV[:, :head].unflatten(1, (head // BLOCK, BLOCK)).sum(-1))
    if head < probs_MV.shape[1]:
        sums.append(probs_MV[:, head:].sum(-1, keepdim=True))
    return torch.cat(sums, 1).double()


def first_above(cumulative_MN: Tensor, target_M: Tensor) -> Tensor:
    """Index of the first element above the row's target in a non-decreasing row; N where none is. int64 [M]."""
    return torch.searchsorted(cumulative_MN, target_M[:, None], right=True).squeeze(1)


def draw(probs_MV: Tensor, u_M: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from unnormalised probs_MV (float32, none negative) with u_M (float64 in [0, 1)).

    Returns token_ids_M (int64, of positive probability) and total_M (float64): NaN or 0 where the row cannot be drawn from,
    and the token is then arbitrary but within the vocabulary.
    """
    vocab_size = probs_MV.shape[1]
    blocks_MK = block_sums(probs_MV).cumsum_(-1)
    total_M = blocks_MK[:, -1]
    target_M = u_M * total_M
    block_M = first_above(blocks_MK, target_M).clamp_(max=blocks_MK.shape[1] - 1)
    before_M = torch.where(block_M > 0, blocks_MK.gather(1, (block_M - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    # The last block of a vocabulary may be short: its index stays inside, its surplus counts nothing.
    at_MB = block_M[:, None] * BLOCK + torch.arange(BLOCK, device=probs_MV.device)
    inside_MB = torch.where(at_MB < vocab_size, probs_MV.gather(1, at_MB.clamp(max=vocab_size - 1)), 0.0)
    token_M = _draw_small(inside_MB, target_M - before_M)
    return (block_M * BLOCK + token_M).clamp_(max=vocab_size - 1), total_M


def _draw_small(probs_MB: Tensor, target_M: Tensor) -> Tensor:
    """First index whose cumulative probability exceeds target_M (float64), or the last of positive probability: a block's
    float32 sum may exceed the float64 sum of its tokens by a rounding error."""
    cumulative_MB = probs_MB.double().cumsum_(-1)
    last_M = first_above(cumulative_MB, torch.nextafter(cumulative_MB[:, -1], cumulative_MB.new_tensor(-1.0)))
    return torch.minimum(first_above(cumulative_MB, target_M), last_M)


def draw_truncated(
    probs_MV: Tensor, u_M: Tensor, top_k_M: Tensor, top_p_M: Tensor, min_p_M: Tensor, narrow: bool = True
) -> tuple[Tensor, Tensor]:
    """`draw` from what min-p, then top-k, then top-p leave of normalised probs_MV.

    min-p keeps tokens of at least min_p times the largest probability; top-k the k likeliest of these; top-p the fewest of
    these, from the likeliest down, whose share of what top-k left reaches top_p. Among equals the lower token id goes
    first, so that top_k = 1 or a tiny top_p is greedy. k as float32, V for none; p 1 and 0 for none.

    A bound that is cheap to get leaves few candidates, and only these are sorted. Waits for the device once, for their
    number. narrow: look for a better bound first, which pays if some rows have top-p alone; the result is the same.
    Returns as `draw` does.
    """
    vocab_size = probs_MV.shape[1]
    at_least_M = _lower_bound(probs_MV, top_k_M, top_p_M, min_p_M, narrow)
    # Candidates of each row side by side, in vocabulary order, padded with probability 0.
    row_N, id_N = (probs_MV >= at_least_M[:, None]).nonzero(as_tuple=True)
    count_M = torch.bincount(row_N, minlength=len(probs_MV))
    width = max(1, int(count_M.max()))
    at_N = torch.arange(len(row_N), device=row_N.device) - (count_M.cumsum(0) - count_M)[row_N]
    ids_MC = torch.zeros(len(probs_MV), width, dtype=torch.int64, device=row_N.device)
    probs_MC = torch.zeros(len(probs_MV), width, dtype=probs_MV.dtype, device=row_N.device)
    ids_MC[row_N, at_N] = id_N
    probs_MC[row_N, at_N] = probs_MV[row_N, id_N]

    sorted_MC, order_MC = probs_MC.sort(dim=-1, descending=True, stable=True)
    kept_MC = sorted_MC.double() * (torch.arange(width, device=row_N.device) < top_k_M[:, None])
    cumulative_MC = kept_MC.cumsum(-1)
    # The whole that top_p is a share of: with neither top-k nor min-p it counts the tokens that are no candidates too.
    whole_M = torch.where((top_k_M < vocab_size) | (min_p_M > 0), cumulative_MC[:, -1], probs_MV.new_ones(()).double())
    # A token stays while the likelier ones before it have not reached the share; the first always does.
    share_M = torch.where(top_p_M < 1.0, top_p_M.double() * whole_M, torch.inf)
    keep_MC = (cumulative_MC - kept_MC < share_M[:, None]) & (kept_MC > 0)
    keep_MC[:, 0] |= sorted_MC[:, 0] > 0
    kept_MC = probs_MC * torch.zeros_like(keep_MC).scatter_(1, order_MC, keep_MC)

    index_M, total_M = draw(kept_MC, u_M)
    # A row of NaN has no candidates: say so, instead of "total 0".
    return ids_MC.gather(1, index_M[:, None]).squeeze(1), torch.where(total_M > 0, total_M, torch.nan)


def _lower_bound(probs_MV: Tensor, top_k_M: Tensor, top_p_M: Tensor, min_p_M: Tensor, narrow: bool) -> Tensor:
    """A probability below which no token can survive: float32 [M], the largest of three bounds.

    min-p: itself. top-k: maxima of blocks are k different tokens' probabilities, so the k-th largest maximum is at most
    the k-th largest probability. top-p: tokens below (1 - top_p) / V sum to less than 1 - top_p, so the nucleus needs
    none of them (halved against rounding); that holds of the whole distribution, so only without the other two.
    """
    vocab_size = probs_MV.shape[1]
    largest_M = probs_MV.amax(-1)
    bound_M = (min_p_M * largest_M).clamp(min=_TINY)
    head = vocab_size // 64 * 64
    if head:
        maxima_MK = probs_MV[:, :head].unflatten(1, (head // 64, 64)).amax(-1).sort(-1, descending=True).values
        num_blocks = maxima_MK.shape[1]
        kth_M = maxima_MK.gather(1, (top_k_M.long() - 1).clamp(max=num_blocks - 1)[:, None]).squeeze(1)
        bound_M = torch.maximum(bound_M, torch.where(top_k_M <= num_blocks, kth_M, 0.0))
    nucleus_M = torch.where((top_k_M >= vocab_size) & (min_p_M == 0), (1.0 - top_p_M) * (0.5 / vocab_size), 0.0)
    if narrow:
        # Bisect for the highest bound that still leaves enough. The margin is above the error of a float32 sum, so the
        # nucleus stays inside however that rounds, and rounding cannot show in the result.
        low_M, high_M = nucleus_M.clamp(min=_TINY), largest_M
        for _ in range(_NARROWING_STEPS):
            middle_M = (low_M.double() * high_M.double()).sqrt().float()
            share_M = torch.where(probs_MV >= middle_M[:, None], probs_MV, 0.0).sum(-1)
            enough_M = share_M - _NARROWING_MARGIN >= top_p_M
            low_M, high_M = torch.where(enough_M, middle_M, low_M), torch.where(enough_M, high_M, middle_M)
        nucleus_M = torch.where(nucleus_M > 0, low_M, nucleus_M)
    return torch.maximum(bound_M, nucleus_M)
