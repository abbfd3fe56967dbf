"""The GPU backend: a step's attention as lists of work on the device (`work_list`), sent in one copy, and kernels over them.

Graphs: `buffers` makes a place of fixed address for steps that decode only, `mixed_buffers` for any step of up to so many
tokens; `plan(batch, buffers)` fills it, and `run` then launches a grid that depends on the buffers alone. Capture once after
such a plan; before each replay, plan into the same buffers again, with the batch's tensors at the addresses that were
captured (see `StepBuffers`).

Does not know how the kernels compute (`quire.kernels.triton.attention`), nor models. Letters of shapes: as in
`quire.attention.base`; I items, E entries to merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.attention.work_list import (
    KINDS,
    MAX_WAVES,
    MUCH_SHARED_BYTES,
    LayerKind,
    WorkList,
    choose_costs,
    choose_tile,
    layer_kind,
    list_one,
    list_work,
)
from quire.errors import ConfigError
from quire.kernels import Kernels, gluon
from quire.kernels.triton.attention import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Tile,
    attend,
    merge,
    merges_itself,
)

HEADER = 64
"""int32 words before the items: for each kind, 32 words apart, the count of items, two zeros (`Launch.drawn_2`) and, at word
16, the count of entries to merge."""
MIXED_WAVES = 2
"""What MAX_WAVES is, in graphs of mixed steps, whose grids have room for the most pieces that there may be, mostly for
nothing."""
MERGE_PROGRAMS_PER_SM = 16


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
    def tiles(self) -> tuple[Tile, ...]:
        """In which kernels of one size differ from those of another."""
        return tuple(launch.tile for launch in self.launches)

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
        self._little_memory = (
            self._device.type == "cuda"
            and torch.cuda.get_device_properties(self._device).shared_memory_per_block_optin < MUCH_SHARED_BYTES
        )
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
                choose_costs("low", launches["low"].tile),
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
                from quire.kernels.gluon import attention, decode  # need a Triton that has Gluon: `gluon.available`

                if merges_itself(launch.tile):
                    decode.attend(
                        q_TND, kv_B2KSD, plan.batch.block_tables_SB, o_TND, launch.items_I8, launch.num_items_1,
                        launch.grid_items, launch.merges_E4, launch.arrivals_EK,
                        partial_o, partial_lse, launch.partial_rows, launch.tile, scale=spec.scale, window=spec.window,
                    )  # fmt: skip
                else:
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
        tile = self._tile("low", layer, max_query_len, max_num_seqs)
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

    def _tile(self, kind: str, layer: LayerKind, max_query_len: int, num_sequences: float = math.inf) -> Tile:
        """num_sequences: of no more than max_query_len tokens each; inf: however many there are, some may have more."""
        tile = self._tiles.get(kind)
        if tile is None:
            long = kind == "high" and max_query_len * layer.group > 64
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_size)
            if long and self._gluon and gluon.supports(*heads, layer.dtype):
                return gluon.choose_tile(max_query_len, layer.window)
            one_token = kind == "low" and max_query_len == 1 and math.isfinite(num_sequences) and layer.window is None
            if one_token and self._gluon and gluon.supports_decode(*heads, layer.dtype):
                return gluon.decode_tile(layer.head_size)
            return choose_tile(
                kind,
                layer,
                max_query_len,
                sequences_per_sm=num_sequences / self._num_sms,
                little_memory=self._little_memory,
            )
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
            longest = int(of_kind[1].max())
            # the tiles for few sequences are compiled for one token each, and Gluon's is for nothing else
            tile = tiles.get(kind) or self._tile(kind, layer, longest, len(found) if longest == 1 else math.inf)
            costs = choose_costs(kind, tile)
            lists[kind] = list_work(found, *of_kind, layer, tile, costs, self._num_sms, self._piece, max_waves)
        return lists

    def _staged(self, words: np.ndarray) -> Tensor:
        """In pinned memory where that exists: torch gives it to nobody else until the copy is done."""
        staged = torch.from_numpy(words)
        return staged.pin_memory() if self._device.type == "cuda" else staged
