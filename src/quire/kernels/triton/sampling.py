"""From logits to tokens in Triton, without sorting the vocabulary and without a word from the host.

What is computed is what `quire.sampling` computes on a CPU: greedy is the lowest id of the largest logits; a draw inverts the
cumulative distribution in vocabulary order with the same Philox number; min-p, top-k and top-p keep the same tokens, among
equals the lower id first. Results differ where rounding decides, by some 1e-7 of probability.

    _piece_kernel    every piece of 2,048 logits: largest, its id, sum of exp(x - largest)      programs: entries x pieces
    _bound_kernel    truncated entries: a weight below which no token can survive                           entries
    _count_kernel    how many candidates a piece has                                                        entries x pieces
    _gather_kernel   candidates of an entry side by side, in vocabulary order                               entries x pieces
    _choose_kernel   the token                                                                              entries

The weight of a token is exp(x - largest x of the row), x = logit / temperature: positive floats are ordered as their bits are,
so that a threshold is found by bisecting over bits (30 halvings), each a pass over the candidates only. The three middle
kernels are launched if a batch has truncated entries at all. Everything has a grid that depends on the batch's size alone and
can be captured in a CUDA graph.

Does not know `SamplingState`: an entry is described by eight words, and its parameters by a row of params_RC.

Shape legend: M = entries, V = vocabulary, R = rows, C = columns of parameters, L = most tokens of a sequence, P = pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The words of an entry, int32; the two of seed and of branch are one uint64 each, low word first.
WORDS = 8
ROW, POSITION, SEED_LOW, SEED_HIGH, BRANCH_LOW, BRANCH_HIGH, FLAGS = range(7)
# Bits of FLAGS.
RANDOM, TRUNCATE = 1, 2
# Codes of an entry, as the sampler's.
OK, NOT_FINITE = 0, 1

_PIECE = 2048
_GROUP = 64  # logits whose largest one is kept, for the bound that top-k gives
_TILE = 2048  # candidates that are looked at together
_TINY = 2.0**-149

_C_RANDOM = tl.constexpr(RANDOM)
_C_TRUNCATE = tl.constexpr(TRUNCATE)
_C_WORDS = tl.constexpr(WORDS)
_C_POSITION = tl.constexpr(POSITION)
_C_SEED_LOW = tl.constexpr(SEED_LOW)
_C_SEED_HIGH = tl.constexpr(SEED_HIGH)
_C_BRANCH_LOW = tl.constexpr(BRANCH_LOW)
_C_BRANCH_HIGH = tl.constexpr(BRANCH_HIGH)
_C_FLAGS = tl.constexpr(FLAGS)
_C_BIG = tl.constexpr(2**31 - 1)
_C_ABOVE_ONE = tl.constexpr(0x3F800001)  # bits of the smallest float32 above 1, the largest weight


@triton.jit
def _low_word(x):
    """The low 32 bits of x as a number in [0, 2**32), int64."""
    return x.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _uniform(word_ptr):
    """`sampling.random.uniform` of an entry: float64 in [0, 1). int64 suffices, as is said there."""
    # Positions fill one word: the second word of the counter, their high one, is 0.
    c0 = _low_word(tl.load(word_ptr + _C_POSITION))
    c1 = c0 * 0
    c2 = _low_word(tl.load(word_ptr + _C_BRANCH_LOW))
    c3 = _low_word(tl.load(word_ptr + _C_BRANCH_HIGH))
    k0 = _low_word(tl.load(word_ptr + _C_SEED_LOW))
    k1 = _low_word(tl.load(word_ptr + _C_SEED_HIGH))
    for _ in tl.static_range(10):
        product_0 = c0 * tl.full((), 0xD2511F53, tl.int64)
        product_1 = c2 * tl.full((), 0xCD9E8D57, tl.int64)
        n0 = ((product_1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0
        n2 = ((product_0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1 = product_1 & 0xFFFFFFFF
        c3 = product_0 & 0xFFFFFFFF
        c0 = n0
        c2 = n2
        k0 = (k0 + tl.full((), 0x9E3779B9, tl.int64)) & 0xFFFFFFFF
        k1 = (k1 + tl.full((), 0xBB67AE85, tl.int64)) & 0xFFFFFFFF
    return ((c0 >> 5) * 67108864 + (c1 >> 6)).to(tl.float64) * (2.0**-53)


@triton.jit
def _scaled(logit_ptr, at, mask, inverse_temperature):
    """logit / temperature in fp32; NaN counts as +inf, so that the largest one tells of both."""
    x = tl.load(logit_ptr + at, mask=mask, other=-float("inf")).to(tl.float32) * inverse_temperature
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _piece_kernel(
    logit_ptr,
    word_ptr,
    param_ptr,
    max_ptr,
    id_ptr,
    sum_ptr,
    group_ptr,
    vocab_size,
    logit_stride,
    param_stride,
    num_pieces,
    num_groups,
    GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    words = word_ptr + entry * _C_WORDS
    inverse_temperature = tl.load(param_ptr + tl.load(words).to(tl.int64) * param_stride)
    at = piece * PIECE + tl.arange(0, PIECE)
    mask = at < vocab_size
    x = _scaled(logit_ptr + entry * logit_stride, at, mask, inverse_temperature)
    largest = tl.max(x, axis=0)
    weight = tl.where(x == -float("inf"), 0.0, tl.exp(x - largest))
    place = entry * num_pieces + piece
    tl.store(max_ptr + place, largest)
    tl.store(id_ptr + place, tl.min(tl.where((x == largest) & mask, at, _C_BIG), axis=0))
    tl.store(sum_ptr + place, tl.sum(weight, axis=0))
    if GROUPS:
        of_group = tl.max(tl.reshape(x, (PIECE // GROUP, GROUP)), axis=1)
        group = piece * (PIECE // GROUP) + tl.arange(0, PIECE // GROUP)
        tl.store(group_ptr + entry * num_groups + group, of_group, mask=group < num_groups)


@triton.jit
def _row_totals(max_ptr, sum_ptr, num_pieces, PIECES: tl.constexpr):
    """(largest x, weight of each piece float64 [PIECES]) of the entry whose pieces begin at the pointers."""
    at = tl.arange(0, PIECES)
    of_piece = tl.load(max_ptr + at, mask=at < num_pieces, other=-float("inf"))
    largest = tl.max(of_piece, axis=0)
    share = tl.where(of_piece == -float("inf"), 0.0, tl.exp(of_piece - largest))
    weight = tl.load(sum_ptr + at, mask=at < num_pieces, other=0.0)
    return largest, share.to(tl.float64) * weight.to(tl.float64)


@triton.jit
def _bound_kernel(
    word_ptr,
    param_ptr,
    max_ptr,
    sum_ptr,
    group_ptr,
    bound_ptr,
    vocab_size,
    param_stride,
    num_pieces,
    num_groups,
    PIECES: tl.constexpr,
    GROUPS: tl.constexpr,
    TINY: tl.constexpr,
):
    """A weight below which no token survives: the largest of three bounds, as in `sampling.draw._lower_bound`."""
    entry = tl.program_id(0).to(tl.int64)
    words = word_ptr + entry * _C_WORDS
    if (tl.load(words + _C_FLAGS) & _C_TRUNCATE) != 0:
        params = param_ptr + tl.load(words).to(tl.int64) * param_stride
        top_k = tl.load(params + 1)
        top_p = tl.load(params + 2)
        min_p = tl.load(params + 3)
        largest, weights = _row_totals(max_ptr + entry * num_pieces, sum_ptr + entry * num_pieces, num_pieces, PIECES)
        bound = tl.maximum(min_p, TINY)
        if top_k < vocab_size:
            if top_k <= num_groups:
                # Largest ones of groups are k different tokens' weights: the k-th largest is at most the k-th weight.
                at = tl.arange(0, GROUPS)
                x = tl.load(group_ptr + entry * num_groups + at, mask=at < num_groups, other=-float("inf"))
                bits = tl.where(x == -float("inf"), 0.0, tl.exp(x - largest)).to(tl.int32, bitcast=True)
                low = tl.full((), 0, tl.int32)
                high = tl.full((), _C_ABOVE_ONE, tl.int32)
                for _ in range(30):
                    middle = (low + high) // 2
                    enough = tl.sum((bits >= middle).to(tl.int32), axis=0) >= top_k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                bound = tl.maximum(bound, low.to(tl.float32, bitcast=True))
        else:
            if min_p == 0.0:
                # Tokens below this together have less than 1 - top_p of the row; halved against rounding.
                total = tl.sum(weights, axis=0).to(tl.float32)
                bound = tl.maximum(bound, (1.0 - top_p) * (0.5 / vocab_size) * total)
        tl.store(bound_ptr + entry, bound)


@triton.jit
def _weights_of_piece(
    logit_ptr, word_ptr, param_ptr, max_ptr, entry, piece, vocab_size, logit_stride, param_stride, num_pieces,
    PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """(ids, weights) of one piece, weight 0 behind the vocabulary's end."""
    inverse_temperature = tl.load(param_ptr + tl.load(word_ptr + entry * _C_WORDS).to(tl.int64) * param_stride)
    pieces = tl.arange(0, PIECES)
    of_piece = tl.load(max_ptr + entry * num_pieces + pieces, mask=pieces < num_pieces, other=-float("inf"))
    largest = tl.max(of_piece, axis=0)
    at = piece * PIECE + tl.arange(0, PIECE)
    x = _scaled(logit_ptr + entry * logit_stride, at, at < vocab_size, inverse_temperature)
    return at, tl.where(x == -float("inf"), 0.0, tl.exp(x - largest))


@triton.jit
def _count_kernel(
    logit_ptr, word_ptr, param_ptr, max_ptr, bound_ptr, count_ptr, vocab_size, logit_stride, param_stride, num_pieces,
    PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if (tl.load(word_ptr + entry * _C_WORDS + _C_FLAGS) & _C_TRUNCATE) != 0:
        _, weight = _weights_of_piece(
            logit_ptr, word_ptr, param_ptr, max_ptr, entry, piece, vocab_size, logit_stride, param_stride, num_pieces,
            PIECES, PIECE,
        )  # fmt: skip
        count = tl.sum((weight >= tl.load(bound_ptr + entry)).to(tl.int32), axis=0)
        tl.store(count_ptr + entry * num_pieces + piece, count)


@triton.jit
def _gather_kernel(
    logit_ptr, word_ptr, param_ptr, max_ptr, bound_ptr, count_ptr, candidate_id_ptr, candidate_ptr, vocab_size,
    logit_stride, param_stride, num_pieces, PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if (tl.load(word_ptr + entry * _C_WORDS + _C_FLAGS) & _C_TRUNCATE) != 0:
        pieces = tl.arange(0, PIECES)
        count = tl.load(count_ptr + entry * num_pieces + pieces, mask=pieces < num_pieces, other=0)
        before = tl.sum(tl.where(pieces < piece, count, 0), axis=0)
        if tl.sum(tl.where(pieces == piece, count, 0), axis=0) > 0:
            at, weight = _weights_of_piece(
                logit_ptr, word_ptr, param_ptr, max_ptr, entry, piece, vocab_size, logit_stride, param_stride,
                num_pieces, PIECES, PIECE,
            )  # fmt: skip
            kept = weight >= tl.load(bound_ptr + entry)
            place = before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(candidate_id_ptr + entry * vocab_size + place, at, mask=kept)
            tl.store(candidate_ptr + entry * vocab_size + place, weight, mask=kept)


@triton.jit
def _at_least(candidate_ptr, num_candidates, bits, TILE: tl.constexpr):
    """(number, sum as float64) of the candidates whose weight's bits are at least `bits`."""
    number = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, num_candidates, TILE):
        at = begin + tl.arange(0, TILE)
        weight = tl.load(candidate_ptr + at, mask=at < num_candidates, other=-1.0)
        kept = weight.to(tl.int32, bitcast=True) >= bits
        number += tl.sum(kept.to(tl.int32), axis=0)
        total += tl.sum(tl.where(kept, weight, 0.0).to(tl.float64), axis=0)
    return number, total


@triton.jit
def _draw_truncated(
    candidate_id_ptr, candidate_ptr, num_candidates, row_total, u, top_k, top_p, min_p, vocab_size, TILE: tl.constexpr
):
    """The token drawn from what top-k and top-p leave of the candidates, all of which passed min-p.

    What stays is given by a threshold and how many of its equals stay, the lower ids first:

        weights  .5 | .3 | .1 .1 .1 | .05      top-k 4: threshold .1, two equals; then top-p .85 (of 1.0): one equal
    """
    threshold = tl.full((), 0, tl.int32)
    num_equal = tl.full((), 2**31 - 1, tl.int32)
    whole = row_total
    if top_k < vocab_size:
        wanted = top_k.to(tl.int32)
        high = tl.full((), _C_ABOVE_ONE, tl.int32)
        if num_candidates > wanted:
            for _ in range(30):
                middle = (threshold + high) // 2
                number, _sum = _at_least(candidate_ptr, num_candidates, middle, TILE)
                enough = number >= wanted
                threshold = tl.where(enough, middle, threshold)
                high = tl.where(enough, high, middle)
            number, above = _at_least(candidate_ptr, num_candidates, threshold + 1, TILE)
            num_equal = wanted - number
            whole = above + num_equal.to(tl.float64) * threshold.to(tl.float32, bitcast=True).to(tl.float64)
        else:
            number, whole = _at_least(candidate_ptr, num_candidates, threshold, TILE)
    else:
        if min_p > 0.0:
            number, whole = _at_least(candidate_ptr, num_candidates, threshold, TILE)

    above = tl.full((), 0.0, tl.float64)
    if top_p < 1.0:
        share = top_p.to(tl.float64) * whole
        low = threshold
        high = tl.full((), _C_ABOVE_ONE, tl.int32)
        for _ in range(30):
            middle = (low + high) // 2
            number, total = _at_least(candidate_ptr, num_candidates, middle, TILE)
            # `low` counts as enough: with all that top-k left, the search has nowhere else to go.
            enough = (total >= share) & (middle > threshold)
            low = tl.where(enough, middle, low)
            high = tl.where(enough | (middle <= threshold), high, middle)
        number, above = _at_least(candidate_ptr, num_candidates, low + 1, TILE)
        equal_weight = tl.maximum(low, 1).to(tl.float32, bitcast=True).to(tl.float64)
        missing = tl.ceil((share - above) / equal_weight)
        missing = tl.minimum(tl.maximum(missing, 1.0), 2147483647.0).to(tl.int32)
        num_equal = tl.where(low > threshold, missing, tl.minimum(num_equal, missing))
        threshold = low

    at_least, _sum = _at_least(candidate_ptr, num_candidates, threshold, TILE)
    number, above = _at_least(candidate_ptr, num_candidates, threshold + 1, TILE)
    equal_weight = threshold.to(tl.float32, bitcast=True).to(tl.float64)
    equals_kept = tl.minimum(num_equal, at_least - number)
    target = u * (above + equals_kept.to(tl.float64) * equal_weight)

    found = tl.full((), 2**31 - 1, tl.int32)
    last = tl.full((), 0, tl.int32)
    carry = tl.full((), 0.0, tl.float64)
    equals = tl.full((), 0, tl.int32)
    for begin in range(0, num_candidates, TILE):
        at = begin + tl.arange(0, TILE)
        weight = tl.load(candidate_ptr + at, mask=at < num_candidates, other=-1.0)
        bits = weight.to(tl.int32, bitcast=True)
        is_equal = (bits == threshold).to(tl.int32)
        rank = equals + tl.cumsum(is_equal, axis=0) - is_equal
        kept = (bits > threshold) | ((is_equal != 0) & (rank < num_equal))
        value = tl.where(kept, weight, 0.0).to(tl.float64)
        cumulative = carry + tl.cumsum(value, axis=0)
        found = tl.minimum(found, tl.min(tl.where(kept & (cumulative > target), at, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(kept, at, 0), axis=0))
        carry += tl.sum(value, axis=0)
        equals += tl.sum(is_equal, axis=0)
    return tl.load(candidate_id_ptr + tl.minimum(found, last))


@triton.jit
def _choose_kernel(
    logit_ptr,
    word_ptr,
    param_ptr,
    max_ptr,
    id_ptr,
    sum_ptr,
    count_ptr,
    candidate_id_ptr,
    candidate_ptr,
    token_ptr,
    code_ptr,
    token_ids_ptr,
    vocab_size,
    logit_stride,
    param_stride,
    num_pieces,
    token_stride,
    TRUNCATED: tl.constexpr,
    WRITE: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    words = word_ptr + entry * _C_WORDS
    row = tl.load(words).to(tl.int64)
    flags = tl.load(words + _C_FLAGS)
    params = param_ptr + row * param_stride
    of_entry = entry * num_pieces
    largest, weights = _row_totals(max_ptr + of_entry, sum_ptr + of_entry, num_pieces, PIECES)
    pieces = tl.arange(0, PIECES)
    of_piece = tl.load(max_ptr + of_entry + pieces, mask=pieces < num_pieces, other=-float("inf"))
    ids = tl.load(id_ptr + of_entry + pieces, mask=pieces < num_pieces, other=2147483647)
    token = tl.min(tl.where(of_piece == largest, ids, 2147483647), axis=0)
    code = tl.full((), 0, tl.int32)
    if (largest == float("inf")) | (largest == -float("inf")):
        code = tl.full((), 1, tl.int32)
    if (code == 0) & ((flags & _C_RANDOM) != 0):
        u = _uniform(words)
        total = tl.sum(weights, axis=0)
        truncated = (flags & _C_TRUNCATE) != 0
        if TRUNCATED and truncated:
            count = tl.load(count_ptr + of_entry + pieces, mask=pieces < num_pieces, other=0)
            token = _draw_truncated(
                candidate_id_ptr + entry * vocab_size, candidate_ptr + entry * vocab_size, tl.sum(count, axis=0),
                total, u, tl.load(params + 1), tl.load(params + 2), tl.load(params + 3), vocab_size, TILE,
            )  # fmt: skip
        if not truncated:
            target = u * total
            cumulative = tl.cumsum(weights, axis=0)
            hit = tl.min(tl.where((cumulative > target) & (weights > 0.0), pieces, 2147483647), axis=0)
            last = tl.max(tl.where(weights > 0.0, pieces, 0), axis=0)
            piece = tl.minimum(hit, last)
            target -= tl.sum(tl.where(pieces < piece, weights, 0.0), axis=0)
            at = piece * PIECE + tl.arange(0, PIECE)
            x = _scaled(logit_ptr + entry * logit_stride, at, at < vocab_size, tl.load(params))
            weight = tl.where(x == -float("inf"), 0.0, tl.exp(x - largest)).to(tl.float64)
            inside = tl.cumsum(weight, axis=0)
            hit = tl.min(tl.where((inside > target) & (weight > 0.0), at, 2147483647), axis=0)
            last = tl.max(tl.where(weight > 0.0, at, 0), axis=0)
            token = tl.minimum(hit, last)
    token = tl.where(code == 0, token, 0)
    tl.store(token_ptr + entry, token)
    tl.store(code_ptr + entry, code)
    if WRITE:
        position = tl.load(words + _C_POSITION).to(tl.int64)
        tl.store(token_ids_ptr + row * token_stride + position, token)


def choose_tokens(
    logits_MV: Tensor,
    words_M8: Tensor,
    params_RC: Tensor,
    result_2M: Tensor,
    *,
    truncated: bool,
    token_ids_RL: Tensor | None = None,
) -> None:
    """Draws a token for each entry into result_2M (int32, contiguous): row 0 the tokens (0 where in error), row 1 the codes.

    logits_MV: any float dtype, rows contiguous. words_M8: int32, see `WORDS`. params_RC: fp32, whose first columns are
    1 / temperature (1 for greedy entries), top-k (V for none), top-p, min-p. truncated: whether any entry has TRUNCATE.
    token_ids_RL: int32, where each token is also
    written at (row, position); None: nowhere.
    """
    num_entries, vocab_size = logits_MV.shape
    assert logits_MV.stride(1) == 1 and words_M8.shape == (num_entries, WORDS) and words_M8.is_contiguous()
    device = logits_MV.device
    num_pieces = triton.cdiv(vocab_size, _PIECE)
    num_groups = triton.cdiv(vocab_size, _GROUP)
    pieces = triton.next_power_of_2(num_pieces)
    max_MP = torch.empty((num_entries, num_pieces), dtype=torch.float32, device=device)
    id_MP = torch.empty((num_entries, num_pieces), dtype=torch.int32, device=device)
    sum_MP = torch.empty_like(max_MP)
    group_MG, count_MP, candidate_id_MV, candidate_MV = max_MP, id_MP, id_MP, max_MP
    if truncated:
        group_MG = torch.empty((num_entries, num_groups), dtype=torch.float32, device=device)
    wide = (num_entries, num_pieces)
    strides = logits_MV.stride(0), params_RC.stride(0)
    _piece_kernel[wide](
        logits_MV, words_M8, params_RC, max_MP, id_MP, sum_MP, group_MG, vocab_size, *strides, num_pieces, num_groups,
        GROUPS=truncated, PIECE=_PIECE, GROUP=_GROUP, num_warps=4,
    )  # fmt: skip
    if truncated:
        bound_M = torch.empty(num_entries, dtype=torch.float32, device=device)
        count_MP = torch.empty_like(id_MP)
        candidate_id_MV = torch.empty((num_entries, vocab_size), dtype=torch.int32, device=device)
        candidate_MV = torch.empty((num_entries, vocab_size), dtype=torch.float32, device=device)
        _bound_kernel[(num_entries,)](
            words_M8, params_RC, max_MP, sum_MP, group_MG, bound_M, vocab_size, strides[1], num_pieces, num_groups,
            PIECES=pieces, GROUPS=triton.next_power_of_2(num_groups), TINY=_TINY, num_warps=8,
        )  # fmt: skip
        _count_kernel[wide](
            logits_MV, words_M8, params_RC, max_MP, bound_M, count_MP, vocab_size, *strides, num_pieces,
            PIECES=pieces, PIECE=_PIECE, num_warps=4,
        )  # fmt: skip
        _gather_kernel[wide](
            logits_MV, words_M8, params_RC, max_MP, bound_M, count_MP, candidate_id_MV, candidate_MV, vocab_size,
            *strides, num_pieces, PIECES=pieces, PIECE=_PIECE, num_warps=4,
        )  # fmt: skip
    _choose_kernel[(num_entries,)](
        logits_MV, words_M8, params_RC, max_MP, id_MP, sum_MP, count_MP, candidate_id_MV, candidate_MV,
        result_2M[0], result_2M[1], result_2M if token_ids_RL is None else token_ids_RL, vocab_size, *strides,
        num_pieces, 0 if token_ids_RL is None else token_ids_RL.stride(0), TRUNCATED=truncated,
        WRITE=token_ids_RL is not None, PIECES=pieces, PIECE=_PIECE, TILE=_TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _logprob_kernel(
    logit_ptr, chosen_ptr, max_ptr, sum_ptr, rank_ptr, vocab_size, logit_stride, num_pieces, PASS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """PASS 0: each piece's largest logit and its sum of exp(x - largest). PASS 1: how many logits are above the chosen."""
    entry = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    logits = logit_ptr + entry * logit_stride
    at = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + at, mask=at < vocab_size, other=-float("inf")).to(tl.float32)
    place = entry * num_pieces + piece
    if PASS == 0:
        largest = tl.max(x, axis=0)
        tl.store(max_ptr + place, largest)
        tl.store(sum_ptr + place, tl.sum(tl.where(x == -float("inf"), 0.0, tl.exp(x - largest)), axis=0))
    else:
        chosen = tl.load(logits + tl.load(chosen_ptr + entry)).to(tl.float32)
        tl.store(rank_ptr + place, tl.sum((x > chosen).to(tl.int32), axis=0))


def logprobs(logits_NV: Tensor, chosen_N: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sampling.logprobs.gather_logprobs` without the [N, V] table of log probabilities.

    Returns token ids (int64 [N, k + 1], column 0 the chosen one), log probabilities (fp32, likewise) and the chosen one's
    rank (int64 [N]). Ranks compare logits: two that differ by less than a log probability can show are no equals here.
    """
    num_entries, vocab_size = logits_NV.shape
    chosen_N = chosen_N.to(torch.int64)
    num_pieces = triton.cdiv(vocab_size, _PIECE)
    max_NP = torch.empty((num_entries, num_pieces), dtype=torch.float32, device=logits_NV.device)
    sum_NP = torch.empty_like(max_NP)
    above_NP = torch.empty_like(max_NP, dtype=torch.int32)
    for step in (0, 1):
        _logprob_kernel[(num_entries, num_pieces)](
            logits_NV, chosen_N, max_NP, sum_NP, above_NP, vocab_size, logits_NV.stride(0), num_pieces,
            PASS=step, PIECE=_PIECE, num_warps=4,
        )  # fmt: skip
    largest_N = max_NP.amax(-1)
    total_N = (sum_NP * (max_NP - largest_N[:, None]).exp()).sum(-1).log() + largest_N
    ids_NK1, logits_NK1 = chosen_N[:, None], logits_NV.gather(1, chosen_N[:, None]).float()
    if k:
        top_NK, top_ids_NK = logits_NV.topk(min(k, vocab_size), dim=-1)
        ids_NK1, logits_NK1 = torch.cat((ids_NK1, top_ids_NK), 1), torch.cat((logits_NK1, top_NK.float()), 1)
    return ids_NK1, logits_NK1 - total_N[:, None], above_NP.sum(-1) + 1
