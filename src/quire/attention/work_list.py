"""How a step's attention is cut into lists of work of even size for a GPU's kernels: NumPy on lengths that the host knows.

A *tile* is some query tokens of one sequence, with all query heads of a group; its keys are cut into *pieces*, as many as keep
all multiprocessors busy to the end; a tile and a piece are an *item*, the work of one program for each key/value head. Tiles
come in two kinds: low ones of 16 rows for decoding (with 4 query heads for each key/value head: up to 4 tokens), and high ones
of 64 to 256 for everything longer. On Hopper GPUs kernels in Gluon compute high ones, and low ones of one token, where they can
(`quire.kernels.gluon`).

Example, 4 query heads for each key/value head, 132 multiprocessors: a sequence of 32,768 keys decodes. One tile, of one token:
its keys are cut into 32 pieces of 1,024 tokens, which with 8 key/value heads are 256 programs, of which each multiprocessor
holds up to 4 at once.

Knows no device and no plan (`quire.attention.triton`). Letters of shapes: as in `quire.attention.base`; I items, E tiles, C
candidates for a piece's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from quire.attention.base import AttentionSpec
from quire.kernels.gluon import GluonTile
from quire.kernels.triton.attention import ITEM_FIELDS, MERGE_FIELDS, Tile, split_head_size

KINDS = ("low", "high")
MUCH_SHARED_BYTES = 150_000
"""That a program may have: what the largest tiles take."""
FEW_PROGRAMS, SOME_PROGRAMS = 1.0, 4.0
"""Tiles times key/value heads, for each multiprocessor: up to so many get larger low tiles."""
EMPTIER = 0.15
"""How much less of its waves the tile of four programs a multiprocessor may fill and still be chosen: see `choose_tile`."""
MAX_WAVES = 4
"""Pieces are cut so that programs are at most so many times what the multiprocessors hold at once, and one a tile more."""


@dataclass(frozen=True)
class LayerKind:
    """What a layer's work list depends on: layers of one kind share it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None
    causal: bool
    dtype: torch.dtype
    """What products are computed in: the common type of queries and cache, else fp32."""

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


def layer_kind(spec: AttentionSpec, dtype: torch.dtype) -> LayerKind:
    same = dtype == spec.kv_dtype
    return LayerKind(
        spec.num_heads, spec.num_kv_heads, spec.head_size, spec.window, spec.causal, dtype if same else torch.float32
    )


@dataclass(frozen=True)
class Costs:
    """How long a kind of item takes, in the time that one key of a program takes where all multiprocessors are full."""

    per_item: float
    """A program's begin and end."""
    merging: float
    """Once, where anything is cut: the second kernel's launch, or the last program's reading of the others' results."""
    per_slot: float
    """For each piece of what is cut most: its results are read by whoever merges."""
    alone: float
    """The part of an item's time that does not shrink when it shares its multiprocessor with fewer others."""
    min_piece: int = 128


LOW_COSTS = {
    1: Costs(120, 50, 4, 0.1),
    2: Costs(120, 300, 0, 0.5),
    3: Costs(120, 100, 0, 0.25),
    4: Costs(120, 0, 6, 0.35),
}
"""By how many programs share a multiprocessor. Fitted to 23, 18, 25 and 25 batches of even and of log-normal lengths that were
timed at up to 12 cuts each."""
DECODE_COSTS = Costs(15, 80, 4, 0.2)
"""Of Gluon's tile for one token; fitted to 76 such batches."""
HIGH_COSTS = Costs(256, 0, 100, 0.6, 256)
"""Fitted to 17 steps of prompts and chunks, in Gluon's tiles."""
LAST_WAVE = 0.5
"""How much of what a last wave of mean items would leave idle is left, when the longest items have come first."""

_PARTS = np.arange(1, 5)
_PIECES = [2**i for i in range(7, 15)] + [3 * 2**i for i in range(6, 13)]
_PIECES_C = np.array([0.0] * len(_PARTS) + _PIECES + [0.0])
"""Sizes of a piece to choose from; first come parts of what is even, last the longest."""


def choose_tile(
    kind: str,
    layer: LayerKind,
    max_query_len: int,
    *,
    sequences_per_sm: float = math.inf,
    little_memory: bool = False,
) -> Tile:
    """The tile for items of `kind`; max_query_len is that of the sequences which get it. sequences_per_sm: how many there are
    at most, for each multiprocessor. little_memory: less shared memory than MUCH_SHARED_BYTES, as on compute capabilities 8.6,
    8.9 and 12.
    """
    size = sum(split_head_size(layer.head_size))
    least = 1 << (layer.group - 1).bit_length()  # rows of one token
    if layer.dtype == torch.float32:  # ieee products on ordinary units: for tests and small models
        rows = max(16, least) if kind == "low" else max(32, least)
        return Tile(rows, 32 if size <= 128 else 16, 4, 2, 2, 1 if kind == "low" else 16)
    if kind == "low":
        rows = max(16, least)
        keys = min(128, 8192 >> (size - 1).bit_length())  # 16 KB of keys
        if rows == 16 and size == 128 and not little_memory:  # measured for this size alone
            # Where programs are few, each has to have more on its way. Fewer and longer ones leave less to merge, too.
            programs_per_sm = sequences_per_sm * layer.num_kv_heads
            if programs_per_sm <= FEW_PROGRAMS:
                return Tile(rows, 2 * keys, 4, 3, 1)
            if programs_per_sm <= SOME_PROGRAMS:
                return Tile(rows, keys, 4, 4, 2)
            # Four programs of one warp draw less power than three of four, and where the card has reached its limit the whole
            # step takes 2 to 4 % less; but a last wave with little in it costs as much.
            if _filled(programs_per_sm / 4) >= _filled(programs_per_sm / 3) - EMPTIER:
                return Tile(rows, keys // 2, 1, 4, 4)
        return Tile(rows, keys, 4, 3, 3 if rows == 16 else 2)
    if size > 128 and little_memory:
        return Tile(max(least, 64), 32, 4, 2, 1, 64)
    if size > 128:
        return Tile(max(least, 64 if max_query_len * layer.group <= 64 else 128), 64, 8, 2, 1, 64)
    if max_query_len * layer.group <= 64:
        return Tile(max(least, 64), 64, 4, 2, 2, 64)
    if max_query_len <= 1024 or little_memory:  # many short triangles: small tiles waste less of them
        return Tile(max(least, 128), 32, 4, 3, 2, 64)
    return Tile(max(least, 256), 64, 8, 2, 1, 32)


def _filled(waves: float) -> float:
    """The part of their places that so many waves fill, if the last one is counted whole."""
    return waves / math.ceil(waves) if math.isfinite(waves) else 1.0


def choose_costs(kind: str, tile: Tile) -> Costs:
    if kind == "high":
        return HIGH_COSTS
    return DECODE_COSTS if isinstance(tile, GluonTile) else LOW_COSTS[tile.per_sm]


def choose_piece(
    lengths_E: np.ndarray, tile: Tile, costs: Costs, num_kv_heads: int, num_sms: int, max_waves: int = MAX_WAVES
) -> int:
    """How many keys a piece has, of tiles with so many: the cut for which all programs together should end soonest.

    The model: a multiprocessor with c of its p places filled takes alone + (1 - alone) c / p of the time that it takes full. If
    all programs have a place at once, they run on evenly filled multiprocessors for as long as their mean takes, and then the
    longest alone. If not, all places are full until the last wave, which mean items fill in part, or, if that takes longer, the
    longest goes on alone; but what is left whole and fills all places is judged by the place that gets most (`_longest_place`).
    """
    total, longest = int(np.add.reduce(lengths_E)), int(np.maximum.reduce(lengths_E))
    places = num_sms * tile.per_sm
    programs = len(lengths_E) * num_kv_heads
    if programs >= 3 * places and longest * places <= total * num_kv_heads:
        return longest  # many short tiles: the longest start first, and the short ones fill the end
    evenly = total * num_kv_heads / places  # keys of each place
    least = max(costs.min_piece, evenly / max_waves)
    candidates_C = _PIECES_C.copy()
    candidates_C[:4] = evenly / _PARTS
    candidates_C[-1] = longest
    np.minimum(np.maximum(candidates_C, least, out=candidates_C), max(longest, least), out=candidates_C)
    candidates_C = np.ceil(candidates_C / tile.num_keys) * tile.num_keys
    pieces_C = np.add.reduce(np.ceil(lengths_E / candidates_C[:, None]), 1)
    programs_C = pieces_C * num_kv_heads
    mean_C = total / pieces_C
    at_once_C = np.where(programs_C < places, mean_C * np.ceil(programs_C / num_sms) / tile.per_sm, evenly)
    last_C = (programs_C - 1) % places + 1  # programs in the last wave
    busiest_C = costs.alone + (1 - costs.alone) * np.ceil(last_C / num_sms) / tile.per_sm
    last_wave_C = np.where(programs_C > places, LAST_WAVE * mean_C * (busiest_C - last_C / places), 0)
    end_C = np.maximum(last_wave_C, costs.alone * (np.minimum(candidates_C, longest) - at_once_C))
    cut_C = pieces_C > len(lengths_E)
    if programs >= places:
        most = _longest_place(lengths_E, places // num_kv_heads)
        end_C = np.where(cut_C, end_C, costs.alone * max(most - evenly, 0))
    merging_C = np.where(cut_C, costs.merging + costs.per_slot * np.ceil(longest / candidates_C), 0)
    cost_C = at_once_C + end_C + programs_C / places * costs.per_item + merging_C
    return int(candidates_C[cost_C.argmin()])


def _longest_place(lengths_E: np.ndarray, num_places: int) -> int:
    """The most that one of these places gets, when the longest begin and each place takes the next as it ends. (By rounds: the
    one with least gets the longest of a round.)"""
    lengths_E = -np.sort(-lengths_E)
    num_places = max(1, num_places)
    loads = lengths_E[:num_places].copy()
    for i in range(num_places, len(lengths_E), num_places):
        more = lengths_E[i : i + num_places]
        loads.sort()
        loads[: len(more)] += more
    return int(loads.max())


@dataclass(frozen=True)
class WorkList:
    """The items of one kind, longest first, and which of their partial results belong together."""

    tile: Tile
    items_I8: np.ndarray
    merges_E4: np.ndarray
    num_slots: int
    partial_rows: int
    """Rows of a partial result that may be filled."""


def list_one(
    start: int,
    seq_len: int,
    layer: LayerKind,
    tile: Tile,
    costs: Costs,
    num_sms: int,
    piece: int | None = None,
    max_waves: int = MAX_WAVES,
) -> WorkList:
    """`list_work` of the first sequence alone, which decodes the token at `start`: the same list in a third of the time, since
    arrays of a few numbers take longer than the numbers. Without a batch to fill them, steps are as short as their planning."""
    begin = 0 if layer.window is None else max(0, seq_len - layer.window)
    length = seq_len - begin
    piece = piece or _choose_piece_of_one(length, tile, costs, layer.num_kv_heads, num_sms, max_waves)
    size = -(-length // (-(-length // piece) * tile.num_keys)) * tile.num_keys
    pieces = -(-length // size)
    if pieces == 1:
        items_I8 = np.array([[0, start, 1, seq_len - 1, begin, seq_len, -1, -1]], dtype=np.int32)
        return WorkList(tile, items_I8, _NO_MERGES, 0, layer.group)
    items = [
        (0, start, 1, seq_len - 1, at, min(at + size, seq_len), i, 0)
        for i, at in enumerate(range(begin, seq_len, size))
    ]
    merges_E4 = np.array([[start, 1, 0, pieces]], dtype=np.int32)
    return WorkList(tile, np.array(items, dtype=np.int32), merges_E4, pieces, layer.group)


def _choose_piece_of_one(length: int, tile: Tile, costs: Costs, num_kv_heads: int, num_sms: int, max_waves: int) -> int:
    """`choose_piece` of one tile, by the same sums in the same order, so that rounding chooses no other."""
    places = num_sms * tile.per_sm
    if num_kv_heads >= 3 * places:
        return length
    evenly = length * num_kv_heads / places
    least = max(costs.min_piece, evenly / max_waves)
    most = max(length, least)
    best, least_cost = 0, math.inf
    seen = set()
    for wanted in (evenly, evenly / 2, evenly / 3, evenly / 4, *_PIECES, length):
        clipped = least if wanted < least else most if wanted > most else wanted
        if clipped in seen:
            continue
        seen.add(clipped)
        candidate = math.ceil(clipped / tile.num_keys) * tile.num_keys
        pieces = math.ceil(length / candidate)
        programs = pieces * num_kv_heads
        mean = length / pieces
        at_once = mean * math.ceil(programs / num_sms) / tile.per_sm if programs < places else evenly
        end = max(0, costs.alone * (min(candidate, length) - at_once))
        if programs > places and pieces > 1:
            last = (programs - 1) % places + 1
            busiest = costs.alone + (1 - costs.alone) * math.ceil(last / num_sms) / tile.per_sm
            end = max(end, LAST_WAVE * mean * (busiest - last / places))
        cost = at_once + end + programs / places * costs.per_item
        cost += costs.merging + costs.per_slot * math.ceil(length / candidate) if pieces > 1 else 0
        if cost < least_cost:
            best, least_cost = candidate, cost
    return best


_NO_MERGES = np.zeros((0, MERGE_FIELDS), dtype=np.int32)


def list_work(
    sequences_S: np.ndarray,
    starts_S: np.ndarray,
    query_lens_S: np.ndarray,
    seq_lens_S: np.ndarray,
    layer: LayerKind,
    tile: Tile,
    costs: Costs,
    num_sms: int,
    piece: int | None = None,
    max_waves: int = MAX_WAVES,
) -> WorkList:
    """The work of some sequences (rows of the block table), whose query tokens begin at `starts`; none empty."""
    tokens = tile.num_rows // layer.group
    if np.maximum.reduce(query_lens_S) <= tokens:  # a tile each, as all that decode have
        sequences_E, firsts_E, tokens_E, seq_lens_E = sequences_S, starts_S, query_lens_S, seq_lens_S
        positions_E = seq_lens_S - query_lens_S
    else:
        tiles_S = -(-query_lens_S // tokens)
        of_E = np.repeat(np.arange(len(sequences_S)), tiles_S)
        skipped_E = (np.arange(len(of_E)) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)) * tokens
        sequences_E, firsts_E, seq_lens_E = sequences_S[of_E], starts_S[of_E] + skipped_E, seq_lens_S[of_E]
        tokens_E = np.minimum(tokens, query_lens_S[of_E] - skipped_E)
        positions_E = (seq_lens_S - query_lens_S)[of_E] + skipped_E
    ends_E = positions_E + tokens_E if layer.causal else seq_lens_E
    begins_E, lengths_E = 0, ends_E
    if layer.window is not None:
        begins_E = np.maximum(0, positions_E - layer.window + 1)
        lengths_E = ends_E - begins_E

    piece = piece or choose_piece(lengths_E, tile, costs, layer.num_kv_heads, num_sms, max_waves)
    pieces_E = -(-lengths_E // piece)
    # even ones, no longer than `piece` if that is a multiple
    sizes_E = -(-lengths_E // (pieces_E * tile.num_keys)) * tile.num_keys
    pieces_E = -(-lengths_E // sizes_E)
    cut_E = pieces_E > 1

    tiles_E8 = np.empty((len(lengths_E), ITEM_FIELDS), dtype=np.int32)
    for i, field_E in enumerate((sequences_E, firsts_E, tokens_E, positions_E, begins_E, ends_E, -1, -1)):
        tiles_E8[:, i] = field_E
    items_I8, merges_E4, num_slots = tiles_E8, _NO_MERGES, 0
    if np.logical_or.reduce(cut_E):
        slots_E = pieces_E * cut_E
        ends_of_slots_E = np.add.accumulate(slots_E)
        num_slots = int(ends_of_slots_E[-1])
        first_slots_E = ends_of_slots_E - slots_E
        tiles_E8[:, 6] = np.where(cut_E, first_slots_E, -1)
        tiles_E8[:, 7] = np.add.accumulate(cut_E) - 1  # means nothing where slot is -1
        items_I8 = tiles_E8.repeat(pieces_E, 0)
        which_I = np.arange(len(items_I8)) - (np.add.accumulate(pieces_E) - pieces_E).repeat(pieces_E)
        sizes_I = sizes_E.repeat(pieces_E)
        items_I8[:, 4] += which_I * sizes_I
        items_I8[:, 5] = np.minimum(items_I8[:, 5], items_I8[:, 4] + sizes_I)
        items_I8[:, 6] += which_I
        merges_E4 = np.empty((len(cut_E), MERGE_FIELDS), dtype=np.int32)
        for i, field_E in enumerate((firsts_E, tokens_E, first_slots_E, pieces_E)):
            merges_E4[:, i] = field_E
        merges_E4 = merges_E4[cut_E]
    if len(items_I8) > 1:
        items_I8 = items_I8[(items_I8[:, 4] - items_I8[:, 5]).argsort(kind="stable")]
    rows = int(np.maximum.reduce(tokens_E)) * layer.group
    return WorkList(tile, items_I8, merges_E4, num_slots, rows)
