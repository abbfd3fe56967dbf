"""The GPU backend: plans a step's attention as lists of work of even size, and runs Triton kernels over them.

A *tile* is some query tokens of one sequence, with all query heads of a group; its keys are cut into *pieces*, as many as keep
all multiprocessors busy to the end; a tile and a piece are an *item*, the work of one program for each key/value head. Tiles
come in two kinds: low ones of 16 rows for decoding (with 4 query heads for each key/value head: up to 4 tokens), and high ones
of 64 or 128 for everything longer. All of it is NumPy on lengths that the host knows, sent in one copy.

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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.errors import ConfigError
from quire.kernels import Kernels
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
"""int32 words before the items: counts of low items, high items, entries to merge of either, 16 words apart."""
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
    total, longest = int(lengths_E.sum()), int(lengths_E.max())
    places = num_sms * tile.per_sm
    programs = len(lengths_E) * num_kv_heads
    if programs >= 3 * places and longest * places <= total * num_kv_heads:
        return longest  # many short tiles: the longest start first, and the short ones fill the end
    evenly = total * num_kv_heads / places  # keys of each place
    candidates_C = np.concatenate(
        [evenly / np.arange(1, 5), 2.0 ** np.arange(7, 15), 1.5 * 2.0 ** np.arange(7, 14), [longest]]
    )
    least = max(costs.min_piece, evenly / max_waves)
    candidates_C = np.clip(candidates_C, least, max(longest, least))
    candidates_C = -(-candidates_C // tile.num_keys) * tile.num_keys
    pieces_C = np.ceil(lengths_E[None, :] / candidates_C[:, None]).sum(1)
    programs_C = pieces_C * num_kv_heads
    last_C = (programs_C - 1) % places + 1  # programs in the last wave
    busiest_C = costs.alone + (1 - costs.alone) * np.ceil(last_C / num_sms) / tile.per_sm
    cost_C = evenly + programs_C / places * costs.per_item + candidates_C * (busiest_C - last_C / places)
    cost_C += np.where(pieces_C > len(lengths_E), costs.merging, 0)
    return int(candidates_C[np.argmin(cost_C)])


@dataclass(frozen=True)
class WorkList:
    """The items of one kind, longest first, and which of their partial results belong together."""

    tile: Tile
    items_I8: np.ndarray
    merges_E4: np.ndarray
    num_slots: int
    partial_rows: int
    """Rows of a partial result that may be filled."""


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
    tiles_S = -(-query_lens_S // tokens)
    of_E = np.repeat(np.arange(len(sequences_S)), tiles_S)
    skipped_E = (np.arange(len(of_E)) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)) * tokens
    tokens_E = np.minimum(tokens, query_lens_S[of_E] - skipped_E)
    positions_E = (seq_lens_S - query_lens_S)[of_E] + skipped_E
    ends_E = positions_E + tokens_E if layer.causal else seq_lens_S[of_E]
    begins_E = np.zeros_like(ends_E) if layer.window is None else np.maximum(0, positions_E - layer.window + 1)
    firsts_E = starts_S[of_E] + skipped_E
    lengths_E = ends_E - begins_E

    piece = piece or choose_piece(lengths_E, tile, costs, layer.num_kv_heads, num_sms, max_waves)
    pieces_E = -(-lengths_E // piece)
    sizes_E = (
        -(-lengths_E // (pieces_E * tile.num_keys)) * tile.num_keys
    )  # even ones, no longer than `piece` if that is a multiple
    pieces_E = -(-lengths_E // sizes_E)
    slots_E = np.where(pieces_E > 1, pieces_E, 0)
    first_slots_E = np.cumsum(slots_E) - slots_E

    of_I = np.repeat(np.arange(len(pieces_E)), pieces_E)
    which_I = np.arange(len(of_I)) - np.repeat(np.cumsum(pieces_E) - pieces_E, pieces_E)
    items_I8 = np.zeros((len(of_I), ITEM_FIELDS), dtype=np.int32)
    items_I8[:, 0] = sequences_S[of_E][of_I]
    items_I8[:, 1] = firsts_E[of_I]
    items_I8[:, 2] = tokens_E[of_I]
    items_I8[:, 3] = positions_E[of_I]
    items_I8[:, 4] = begins_E[of_I] + which_I * sizes_E[of_I]
    items_I8[:, 5] = np.minimum(ends_E[of_I], items_I8[:, 4] + sizes_E[of_I])
    items_I8[:, 6] = np.where(pieces_E[of_I] > 1, first_slots_E[of_I] + which_I, -1)
    items_I8[:, 7] = (np.cumsum(pieces_E > 1) - 1)[of_I]  # means nothing where slot is -1
    items_I8 = items_I8[np.argsort(items_I8[:, 4] - items_I8[:, 5], kind="stable")]

    cut_E = pieces_E > 1
    merges_E4 = np.stack([firsts_E, tokens_E, first_slots_E, pieces_E], 1)[cut_E].astype(np.int32)
    rows = int(tokens_E.max()) * layer.group
    return WorkList(tile, items_I8, merges_E4, int(slots_E.sum()), rows)


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
                num_slots,
                rows,
            )
        )
    return launches


@dataclass(frozen=True)
class StepBuffers:
    """Where plans of one graph go: for up to max_num_seqs sequences of up to max_query_len tokens, all in low tiles; or, with
    max_tokens, of so many tokens together and of any length each, in tiles of both kinds.

    `work` is all that a plan writes on the device. What the kernels read beside it has to stay in its place too, and that is
    the batch's owner's to see to: block_tables_SB (its row stride included), slots_T, and the layer's inputs. Neither lengths
    nor query_start_loc are read on the device. Padding needs nothing: a sequence of no query tokens makes no item.
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
            self._fill(buffers, plan)
            plan.launches[buffers.layer] = buffers.launches
        return plan

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
            attend(
                q_TND, kv_B2KSD, plan.batch.block_tables_SB, o_TND, launch.items_I8, launch.num_items_1, launch.grid_items,
                launch.merges_E4, launch.arrivals_EK,
                partial_o, partial_lse, launch.partial_rows, launch.tile,
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
            return choose_tile(kind, layer, max_query_len)
        return replace(tile, num_rows=max(tile.num_rows, 1 << (layer.group - 1).bit_length()))

    def _fill(self, buffers: StepBuffers, plan: TritonPlan) -> None:
        launches = dict(zip(KINDS, buffers.launches))
        lists = self._work_lists(
            plan, buffers.layer, {kind: launch.tile for kind, launch in launches.items()}, buffers.max_waves
        )
        num_tokens = int(plan.query_starts_S1[-1])
        if (
            len(plan.seq_lens_S) > buffers.max_num_seqs
            or num_tokens > (buffers.max_tokens or num_tokens)
            or any(k not in launches or work.partial_rows > launches[k].partial_rows for k, work in lists.items())
        ):
            raise ValueError(
                f"the step is larger than its buffers: {buffers.max_num_seqs} sequences, "
                + (f"{buffers.max_tokens} tokens" if buffers.max_tokens else f"{buffers.max_query_len} tokens each")
            )
        words = np.zeros(buffers.work.shape[0], dtype=np.int32)
        at = HEADER
        for i, (kind, launch) in enumerate(launches.items()):
            end = at + launch.grid_items * ITEM_FIELDS
            if work := lists.get(kind):
                assert len(work.items_I8) <= launch.grid_items and len(work.merges_E4) <= launch.max_merges
                assert work.num_slots <= launch.num_slots
                words[32 * i], words[32 * i + 16] = len(work.items_I8), len(work.merges_E4)
                words[at : at + work.items_I8.size] = work.items_I8.ravel()
                words[end : end + work.merges_E4.size] = work.merges_E4.ravel()
            at += words_of(launch.grid_items, launch.max_merges, buffers.layer.num_kv_heads)
        buffers.work.copy_(self._staged(words), non_blocking=True)

    def _launches(self, plan: TritonPlan, layer: LayerKind) -> list[Launch]:
        lists = self._work_lists(plan, layer)
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
        plan: TritonPlan,
        layer: LayerKind,
        tiles: Mapping[str, Tile] | None = None,
        max_waves: int = MAX_WAVES,
    ) -> dict[str, WorkList]:
        """Sequences whose queries fit in one low tile, and the others; in `tiles` where those are given."""
        query_lens_S = np.diff(plan.query_starts_S1).astype(np.int64)
        starts_S, seq_lens_S = plan.query_starts_S1[:-1].astype(np.int64), plan.seq_lens_S.astype(np.int64)
        low_tokens = self._tile("low", layer, 1).num_rows // layer.group
        lists = {}
        for kind, chosen_S in (
            ("low", (query_lens_S > 0) & (query_lens_S <= low_tokens)),
            ("high", query_lens_S > low_tokens),
        ):
            found = np.flatnonzero(chosen_S)
            if len(found):
                tile = (tiles or {}).get(kind) or self._tile(kind, layer, int(query_lens_S[found].max()))
                lists[kind] = list_work(
                    found, starts_S[found], query_lens_S[found], seq_lens_S[found], layer, tile, COSTS[kind],
                    self._num_sms, self._piece, max_waves,
                )  # fmt: skip
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
