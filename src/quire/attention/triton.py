"""The GPU backend: plans a step's attention as lists of work of even size, and runs Triton kernels over them.

A *tile* is some query tokens of one sequence, with all query heads of a group; its keys are cut into *pieces*, as many as keep
all multiprocessors busy to the end; a tile and a piece are an *item*, the work of one program for each key/value head. Tiles
come in two kinds: low ones of 16 rows for decoding (with 4 query heads for each key/value head: up to 4 tokens), and high ones
of 64 or 128 for everything longer, which on Hopper GPUs a kernel in Gluon computes where it can (`quire.kernels.gluon`). All
of it is NumPy on lengths that the host knows, sent in one copy.

Example, 4 query heads for each key/value head, 132 multiprocessors: a sequence of 32,768 keys decodes. One tile, of one token:
its keys are cut into 50 pieces of 704 tokens, or so, which with 8 key/value heads are 400 programs.

Graphs: `buffers` makes a place of fixed address for steps that decode only, `mixed_buffers` for any step of up to so many
tokens; `plan(batch, buffers)` fills it, and `run` then launches a grid that depends on the buffers alone. Capture once after
such a plan; before each replay, plan into the same buffers again, with the batch's tensors at the addresses that were
captured (see `StepBuffers`).

Does not know how the kernels compute (`quire.kernels.triton.attention`), nor models. Letters of shapes: as in
`quire.attention.base`; I items, E entries (in the planning: tiles), C candidates for a piece's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.errors import ConfigError
from quire.kernels import Kernels, gluon
from quire.kernels.triton.attention import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Tile,
    attend,
    merge,
    merges_itself,
    split_head_size,
)

KINDS = ("low", "high")
HEADER = 64
"""int32 words before the items: for each kind, 32 words apart, the count of items, two zeros (`Launch.drawn_2`) and, at word
16, the count of entries to merge."""
MAX_WAVES = 4
"""Pieces are cut so that programs are at most so many times what the multiprocessors hold at once, and one a tile more."""
MIXED_WAVES = 2
"""The same in graphs of mixed steps: their grids have room for the most pieces that there may be, mostly for nothing."""
MERGE_PROGRAMS_PER_SM = 16


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


@dataclass(frozen=True)
class Costs:
    """How long a kind of item takes, in the time that one key of a program takes where all multiprocessors are full."""

    per_item: float
    """A program's begin and end."""
    merging: float
    """Once, where anything is cut: the second kernel's launch, or the last program's reading of the others' results."""
    alone: float
    """The part of an item's time that does not shrink when it shares its multiprocessor with fewer others."""
    min_piece: int


COSTS = {"low": Costs(44, 40, 0.28, 128), "high": Costs(64, 60, 0.6, 256)}

_PARTS = np.arange(1, 5)
_PIECES = [2**i for i in range(7, 15)] + [3 * 2**i for i in range(6, 13)]
_PIECES_C = np.array([0.0] * len(_PARTS) + _PIECES + [0.0])
"""Sizes of a piece to choose from; first come parts of what is even, last the longest."""


def choose_tile(kind: str, layer: LayerKind, max_query_len: int) -> Tile:
    """The tile for items of `kind`; max_query_len is that of the sequences which get it."""
    size = sum(split_head_size(layer.head_size))
    least = 1 << (layer.group - 1).bit_length()  # rows of one token
    if layer.dtype == torch.float32:  # ieee products on ordinary units: for tests and small models
        rows = max(16, least) if kind == "low" else max(32, least)
        return Tile(rows, 32 if size <= 128 else 16, 4, 2, 2, 1 if kind == "low" else 16)
    if kind == "low":
        rows = max(16, least)
        keys = min(128, 8192 >> (size - 1).bit_length())  # 16 KB of keys
        return Tile(rows, keys, 4, 3, 3 if rows == 16 else 2)
    if size > 128:
        return Tile(max(least, 64 if max_query_len * layer.group <= 64 else 128), 64, 8, 2, 1, 64)
    if max_query_len * layer.group <= 64:
        return Tile(max(least, 64), 64, 4, 2, 2, 64)
    if max_query_len <= 1024:  # many short triangles: small tiles waste less of them
        return Tile(max(least, 128), 32, 4, 3, 2, 64)
    return Tile(max(least, 256), 64, 8, 2, 1, 32)


def choose_piece(
    lengths_E: np.ndarray, tile: Tile, costs: Costs, num_kv_heads: int, num_sms: int, max_waves: int = MAX_WAVES
) -> int:
    """How many keys a piece has, of tiles with so many: the cut for which all programs together should end soonest.

    The model: a multiprocessor with c of its p places filled takes alone + (1 - alone) c / p of the time that it takes full.
    All are full but in the last wave; cutting finer shortens that, and costs more beginnings.
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
    last_C = (programs_C - 1) % places + 1  # programs in the last wave
    busiest_C = costs.alone + (1 - costs.alone) * np.ceil(last_C / num_sms) / tile.per_sm
    cost_C = evenly + programs_C / places * costs.per_item + candidates_C * (busiest_C - last_C / places)
    cost_C += np.where(pieces_C > len(lengths_E), costs.merging, 0)
    return int(candidates_C[cost_C.argmin()])


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
        last = (programs - 1) % places + 1
        busiest = costs.alone + (1 - costs.alone) * math.ceil(last / num_sms) / tile.per_sm
        cost = evenly + programs / places * costs.per_item + candidate * (busiest - last / places)
        cost += costs.merging if pieces > 1 else 0
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


@dataclass(frozen=True)
class Launch:
    """One kind's part of the work on the device: what kernels are launched with."""

    tile: Tile
    items_I8: Tensor
    num_items_1: Tensor
    merges_E4: Tensor
    num_merges_1: Tensor
    arrivals_EK: Tensor
    """Zeros, and again after each layer: see `kernels.triton.attention.attend`."""
    drawn_2: Tensor
    """Zeros, and again after each layer: see `kernels.gluon.attention.attend`."""
    num_slots: int
    partial_rows: int
    """The grid: capacities, of which the counts on the device say how much is to be done."""

    @property
    def grid_items(self) -> int:
        return self.items_I8.shape[0]

    @property
    def max_merges(self) -> int:
        return self.merges_E4.shape[0]


def words_of(num_items: int, num_merges: int, num_kv_heads: int) -> int:
    """int32 words that `lay_out` gives a kind."""
    return num_items * ITEM_FIELDS + num_merges * (MERGE_FIELDS + num_kv_heads)


def lay_out(work: Tensor, capacities: Mapping[str, tuple[Tile, int, int, int, int]], num_kv_heads: int) -> list[Launch]:
    """Views of one int32 buffer: header, then each kind's items, merges and arrivals.

    A kind: tile, items, merges, slots, rows.
    """
    launches, at = [], HEADER
    for i, kind in enumerate(KINDS):
        if kind not in capacities:
            continue
        tile, num_items, num_merges, num_slots, rows = capacities[kind]
        end = at + num_items * ITEM_FIELDS
        items, merges = work[at:end], work[end : end + num_merges * MERGE_FIELDS]
        arrivals = work[end + num_merges * MERGE_FIELDS : at + words_of(num_items, num_merges, num_kv_heads)]
        at += words_of(num_items, num_merges, num_kv_heads)
        launches.append(
            Launch(
                tile,
                items.view(-1, ITEM_FIELDS),
                work[32 * i : 32 * i + 1],
                merges.view(-1, MERGE_FIELDS),
                work[32 * i + 16 : 32 * i + 17],
                arrivals,
                work[32 * i + 1 : 32 * i + 3],
                num_slots,
                rows,
            )
        )
    return launches


@dataclass(frozen=True)
class StepBuffers:
    """Where plans of one graph go: for up to max_num_seqs sequences of up to max_query_len tokens, all in low tiles; or, with
    max_tokens, of so many tokens together and of any length each, in tiles of both kinds.

    `work` is all that a plan writes on the device: `plan` sends it there, or `fill` writes what its owner sends. What the
    kernels read beside it has to stay in its place too, and that is the batch's owner's to see to: block_tables_SB (its row
    stride included), slots_T, and the layer's inputs. Neither lengths nor query_start_loc are read on the device. Padding needs
    nothing: a sequence of no query tokens makes no item.
    """

    layer: LayerKind
    max_num_seqs: int
    max_query_len: int
    work: Tensor
    launches: list[Launch]
    """Of each kind that there may be, in the order of KINDS."""
    max_tokens: int | None = None

    @property
    def max_waves(self) -> int:
        return MAX_WAVES if self.max_tokens is None else MIXED_WAVES

    def at(self, work: Tensor) -> StepBuffers:
        """The same in other words, int32 and as many as `work` has."""
        assert work.shape == self.work.shape
        capacities = {
            kind: (launch.tile, launch.grid_items, launch.max_merges, launch.num_slots, launch.partial_rows)
            for kind, launch in zip(KINDS, self.launches)
        }
        return replace(self, work=work, launches=lay_out(work, capacities, self.layer.num_kv_heads))


@dataclass(frozen=True)
class TritonPlan(Plan):
    """The host's lengths, and the work for each kind of layer: made when the first layer of the kind runs, then shared."""

    query_starts_S1: np.ndarray
    seq_lens_S: np.ndarray
    launches: dict[LayerKind, list[Launch]] = field(default_factory=dict)
    fixed: bool = False
    """Planned into buffers: no list is made that a graph would not see renewed."""


class TritonBackend(AttentionBackend):
    """`tiles`: instead of what `choose_tile` says, by kind; `piece`: of so many keys, instead of what `choose_piece` says."""

    name = "triton"

    def __init__(
        self,
        kernels: Kernels,
        device: torch.device | str,
        *,
        num_sms: int | None = None,
        tiles: Mapping[str, Tile] | None = None,
        piece: int | None = None,
    ) -> None:
        self._kernels = kernels
        self._device = torch.device(device)
        if num_sms is None:
            num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._num_sms = num_sms
        self._tiles = dict(tiles or {})
        self._gluon = gluon.available(self._device)
        self._piece = piece

    def check(self, spec: AttentionSpec) -> None:
        if spec.head_size > 256:
            raise ConfigError(f"attention backend triton needs a head size of up to 256, not {spec.head_size}")
        if spec.num_heads // spec.num_kv_heads > 128:
            raise ConfigError(f"attention backend triton takes up to 128 query heads for each key/value head: {spec}")
        if spec.scale <= 0:
            raise ConfigError(f"attention backend triton needs a positive scale, not {spec.scale}")
        if spec.kv_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"attention backend triton keeps keys in fp32, bf16 or fp16, not {spec.kv_dtype}")

    def plan(self, batch: AttentionBatch, buffers: StepBuffers | None = None) -> TritonPlan:
        """Takes the lengths from the batch's host copies; where it has none, waits for the device to give them.

        With buffers, writes the work into them (in one copy, ordered before what this stream runs next).
        """
        starts_S1, lengths_S = batch.query_start_loc_host_S1, batch.seq_lens_host_S
        if starts_S1 is None or lengths_S is None:
            starts_S1, lengths_S = batch.query_start_loc_S1.cpu().numpy(), batch.seq_lens_S.cpu().numpy()
        plan = TritonPlan(batch, starts_S1, lengths_S, fixed=buffers is not None)
        if buffers is not None:
            words = np.zeros(buffers.work.shape[0], dtype=np.int32)
            self.fill(buffers, starts_S1, lengths_S, words)
            buffers.work.copy_(self._staged(words), non_blocking=True)
            plan.launches[buffers.layer] = buffers.launches
        return plan

    def fill(
        self, buffers: StepBuffers, query_starts_S1: np.ndarray, seq_lens_S: np.ndarray, words: np.ndarray
    ) -> None:
        """Writes a step's work into `words`, int32 zeros on the host, whose owner sends them to `buffers.work`.

        That is all of `plan` that a graph needs to be replayed. Raises ValueError if the step is larger than the buffers.
        """
        launches = dict(zip(KINDS, buffers.launches))
        num_tokens = int(query_starts_S1[-1])
        if len(seq_lens_S) == 1 and num_tokens - int(query_starts_S1[0]) == 1:
            one = list_one(
                int(query_starts_S1[0]),
                int(seq_lens_S[0]),
                buffers.layer,
                launches["low"].tile,
                COSTS["low"],
                self._num_sms,
                self._piece,
                buffers.max_waves,
            )
            lists = {"low": one}
        else:
            lists = self._work_lists(
                query_starts_S1,
                seq_lens_S,
                buffers.layer,
                {kind: launch.tile for kind, launch in launches.items()},
                buffers.max_waves,
            )
        if (
            len(seq_lens_S) > buffers.max_num_seqs
            or num_tokens > (buffers.max_tokens or num_tokens)
            or any(k not in launches or work.partial_rows > launches[k].partial_rows for k, work in lists.items())
        ):
            raise ValueError(
                f"the step is larger than its buffers: {buffers.max_num_seqs} sequences, "
                + (f"{buffers.max_tokens} tokens" if buffers.max_tokens else f"{buffers.max_query_len} tokens each")
            )
        at = HEADER
        for i, (kind, launch) in enumerate(launches.items()):
            grid_items, max_merges = launch.grid_items, launch.max_merges
            if work := lists.get(kind):
                num_items, num_merges = len(work.items_I8), len(work.merges_E4)
                assert num_items <= grid_items and num_merges <= max_merges and work.num_slots <= launch.num_slots
                words[32 * i], words[32 * i + 16] = num_items, num_merges
                words[at : at + num_items * ITEM_FIELDS] = work.items_I8.reshape(-1)
                if num_merges:
                    end = at + grid_items * ITEM_FIELDS
                    words[end : end + num_merges * MERGE_FIELDS] = work.merges_E4.reshape(-1)
            at += words_of(grid_items, max_merges, buffers.layer.num_kv_heads)

    def run(
        self, plan: Plan, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self._kernels.write_kv(k_TKD, v_TKD, kv_B2KSD, plan.batch.slots_T)
        return self.attend(plan, q_TND, kv_B2KSD, spec)

    def attend(self, plan: Plan, q_TND: Tensor, kv_B2KSD: Tensor, spec: AttentionSpec) -> Tensor:
        """`run` for keys and values that are in their slots already (written by a kernel that rotates them, say)."""
        assert isinstance(plan, TritonPlan)
        launches = self.prepare(plan, spec, q_TND.dtype)
        o_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        num_kv_heads, head_size = spec.num_kv_heads, spec.head_size
        for launch in launches:
            shape = (max(1, launch.num_slots), num_kv_heads, launch.partial_rows)
            partial_lse = torch.empty(shape, dtype=torch.float32, device=q_TND.device)
            partial_o = torch.empty((*shape, head_size), dtype=torch.float32, device=q_TND.device)
            if isinstance(launch.tile, gluon.GluonTile) and not spec.softcap and gluon.takes(q_TND, kv_B2KSD):
                from quire.kernels.gluon import attention  # needs a Triton that has Gluon: `gluon.available`

                attention.attend(
                    q_TND, kv_B2KSD, plan.batch.block_tables_SB, o_TND, launch.items_I8, launch.num_items_1, launch.drawn_2,
                    launch.grid_items, partial_o, partial_lse, launch.partial_rows, launch.tile,
                    scale=spec.scale, window=spec.window, causal=spec.causal,
                )  # fmt: skip
            else:
                attend(
                    q_TND, kv_B2KSD, plan.batch.block_tables_SB, o_TND, launch.items_I8, launch.num_items_1, launch.grid_items,
                    launch.merges_E4, launch.arrivals_EK,
                    partial_o, partial_lse, launch.partial_rows, launch.tile,
                    max_waiting=self._num_sms if q_TND.is_cuda else 0,  # of the several times as many that the device holds
                    scale=spec.scale, window=spec.window, softcap=spec.softcap, causal=spec.causal,
                )  # fmt: skip
            if launch.max_merges and not merges_itself(launch.tile):
                jobs = launch.max_merges * num_kv_heads * launch.partial_rows
                grid = min(jobs, MERGE_PROGRAMS_PER_SM * self._num_sms)
                merge(o_TND, launch.merges_E4, launch.num_merges_1, grid, partial_o, partial_lse, launch.partial_rows)
        return o_TND

    def prepare(self, plan: TritonPlan, spec: AttentionSpec, dtype: torch.dtype) -> list[Launch]:
        """The work for layers of this spec and queries of this dtype; without this call, the first such layer makes it."""
        layer = layer_kind(spec, dtype)
        launches = plan.launches.get(layer)
        if launches is None:
            if plan.fixed:
                raise ValueError(f"the plan's buffers are for other layers than {layer}")
            launches = plan.launches[layer] = self._launches(plan, layer)
        return launches

    def buffers(
        self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int, max_query_len: int = 1
    ) -> StepBuffers:
        """For graphs over decoding steps: layers of this spec (scale and softcap aside) and queries of this dtype.

        Raises ConfigError if queries of max_query_len tokens need high tiles.
        """
        layer = layer_kind(spec, dtype)
        tile = self._tile("low", layer, max_query_len)
        if max_query_len > tile.num_rows // layer.group:
            raise ConfigError(f"graphs take up to {tile.num_rows // layer.group} query tokens, not {max_query_len}")
        work, launches = self._room({"low": (tile, max_num_seqs, max_query_len * layer.group)}, layer, MAX_WAVES)
        return StepBuffers(layer, max_num_seqs, max_query_len, work, launches)

    def mixed_buffers(
        self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int, max_tokens: int, max_query_len: int
    ) -> StepBuffers:
        """For graphs over any steps of up to max_tokens tokens; max_query_len, which may be exceeded, chooses the high tiles.

        A sequence of more than low tiles hold, say 5 tokens, has a high tile for each 32 tokens and one for the rest: 8,192
        tokens of 256 sequences are 504 tiles at most, 512 tokens 114.
        """
        layer = layer_kind(spec, dtype)
        low, high = self._tile("low", layer, 1), self._tile("high", layer, max_query_len)
        low_tokens, high_tokens = low.num_rows // layer.group, high.num_rows // layer.group
        kinds = {"low": (low, min(max_num_seqs, max_tokens), low_tokens * layer.group)}
        num_high = min(max_num_seqs, max_tokens // (low_tokens + 1))
        if num_high:
            tiles = (max_tokens + num_high * (high_tokens - 1)) // high_tokens
            kinds["high"] = (high, tiles, high_tokens * layer.group)
        work, launches = self._room(kinds, layer, MIXED_WAVES)
        return StepBuffers(layer, max_num_seqs, max_query_len, work, launches, max_tokens)

    def _room(
        self, kinds: Mapping[str, tuple[Tile, int, int]], layer: LayerKind, max_waves: int
    ) -> tuple[Tensor, list[Launch]]:
        """For each kind: tile, most tiles, most rows of a tile. Pieces number one a tile and `cuts` more (`choose_piece`)."""
        capacities, size = {}, HEADER
        for kind, (tile, num_tiles, rows) in kinds.items():
            cuts = -(-max_waves * self._num_sms * tile.per_sm // layer.num_kv_heads)
            items, merges = num_tiles + cuts, min(num_tiles, cuts)
            capacities[kind] = (tile, items, merges, min(items, 2 * cuts), rows)
            size += words_of(items, merges, layer.num_kv_heads)
        work = torch.zeros(size, dtype=torch.int32, device=self._device)
        return work, lay_out(work, capacities, layer.num_kv_heads)

    def _tile(self, kind: str, layer: LayerKind, max_query_len: int) -> Tile:
        tile = self._tiles.get(kind)
        if tile is None:
            long = kind == "high" and max_query_len * layer.group > 64
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_size)
            if long and self._gluon and gluon.supports(*heads, layer.dtype):
                return gluon.choose_tile(max_query_len, layer.window)
            return choose_tile(kind, layer, max_query_len)
        return replace(tile, num_rows=max(tile.num_rows, 1 << (layer.group - 1).bit_length()))

    def _launches(self, plan: TritonPlan, layer: LayerKind) -> list[Launch]:
        lists = self._work_lists(plan.query_starts_S1, plan.seq_lens_S, layer)
        header = np.zeros(HEADER, dtype=np.int32)
        parts, capacities = [header], {}
        for i, kind in enumerate(KINDS):
            if work := lists.get(kind):
                header[32 * i], header[32 * i + 16] = len(work.items_I8), len(work.merges_E4)
                arrivals = np.zeros(len(work.merges_E4) * layer.num_kv_heads, dtype=np.int32)
                parts += [work.items_I8.ravel(), work.merges_E4.ravel(), arrivals]
                capacities[kind] = (
                    work.tile,
                    len(work.items_I8),
                    len(work.merges_E4),
                    work.num_slots,
                    work.partial_rows,
                )
        words = self._staged(np.concatenate(parts)).to(self._device, non_blocking=True)
        return lay_out(words, capacities, layer.num_kv_heads)

    def _work_lists(
        self,
        query_starts_S1: np.ndarray,
        seq_lens_S: np.ndarray,
        layer: LayerKind,
        tiles: Mapping[str, Tile] | None = None,
        max_waves: int = MAX_WAVES,
    ) -> dict[str, WorkList]:
        """Sequences whose queries fit in one low tile, and the others; in `tiles` where those are given."""
        starts_S, seq_lens_S = query_starts_S1[:-1].astype(np.int64), seq_lens_S.astype(np.int64)
        query_lens_S = query_starts_S1[1:] - starts_S
        tiles = tiles or {}
        low_tokens = (tiles.get("low") or self._tile("low", layer, 1)).num_rows // layer.group
        low_S = (query_lens_S > 0) & (query_lens_S <= low_tokens)
        num_low = int(np.count_nonzero(low_S))
        if num_low == len(low_S):
            parts = {"low": np.arange(num_low)} if num_low else {}
        else:
            parts = {"low": np.flatnonzero(low_S), "high": np.flatnonzero(query_lens_S > low_tokens)}
        lists = {}
        for kind, found in parts.items():
            if not len(found):
                continue
            of_kind = (starts_S, query_lens_S, seq_lens_S)
            if len(found) < len(low_S):
                of_kind = (starts_S[found], query_lens_S[found], seq_lens_S[found])
            tile = tiles.get(kind) or self._tile(kind, layer, int(of_kind[1].max()))
            lists[kind] = list_work(found, *of_kind, layer, tile, COSTS[kind], self._num_sms, self._piece, max_waves)
        return lists

    def _staged(self, words: np.ndarray) -> Tensor:
        """In pinned memory where that exists: torch gives it to nobody else until the copy is done."""
        staged = torch.from_numpy(words)
        return staged.pin_memory() if self._device.type == "cuda" else staged


def layer_kind(spec: AttentionSpec, dtype: torch.dtype) -> LayerKind:
    same = dtype == spec.kv_dtype
    return LayerKind(
        spec.num_heads, spec.num_kv_heads, spec.head_size, spec.window, spec.causal, dtype if same else torch.float32
    )
