"""The least that runs a model over a paged cache: scattered blocks, mixed batches, one pool for each kind of layer.

Written apart from the engine's own runner, so that a mistake there is not repeated here.
"""

from dataclasses import dataclass, field

import pytest
import torch

from quire.attention import AttentionBackend, AttentionBatch, select_backend
from quire.errors import ConfigError
from quire.kernels import Kernels, select_kernels
from quire.layers.context import BuildContext, ForwardContext
from quire.model_config import load_model_config
from quire.models import build_model
from quire.parallel import ParallelGroup
from quire.worker.weights import load_weights, resolve_dtype


@dataclass
class PagedModel:
    """A model, its pools and its sequences. `step` feeds some tokens of some sequences and gives all their logits."""

    directory: str
    kernels: Kernels
    attention: AttentionBackend
    max_model_len: int | None = None
    max_num_seqs: int = 4
    block_size: int = 4
    dtype: str = "auto"
    load_format: str = "auto"
    group: ParallelGroup = field(default_factory=ParallelGroup)
    hf_overrides: dict = field(default_factory=dict)

    def __post_init__(self):
        self.config = load_model_config(self.directory, self.hf_overrides)
        self.max_model_len = self.config.resolve_max_model_len(self.max_model_len)
        dtype = resolve_dtype(self.dtype, self.config)
        context = BuildContext(
            dtype=dtype,
            device=torch.device("cpu"),
            kernels=self.kernels,
            attention=self.attention,
            max_model_len=self.max_model_len,
            group=self.group,
        )
        self.model = build_model(self.config, context)
        load_weights(self.model, self.directory, load_format=self.load_format)
        self.seq_lens = [0] * self.max_num_seqs

        # A cache group for each window. Every sequence owns random blocks from the start, other ones in each group;
        # block 0 is nobody's. NaN shows if a slot is read that was not written.
        self.groups = {}
        blocks_per_seq = -(-self.max_model_len // self.block_size)
        generator = torch.Generator().manual_seed(0)
        for window in dict.fromkeys(self.config.layer_windows):
            layers = [i for i, w in enumerate(self.config.layer_windows) if w == window]
            num_blocks = self.max_num_seqs * blocks_per_seq
            spec = self.model.attention_specs[layers[0]]
            shape = (num_blocks + 1, len(layers), 2, spec.num_kv_heads, self.block_size, spec.head_size)
            tables = (torch.randperm(num_blocks, generator=generator) + 1).view(self.max_num_seqs, blocks_per_seq)
            self.groups[window] = layers, tables.int(), torch.full(shape, float("nan"), dtype=dtype)

    def step(self, chunks):
        """`chunks`: {sequence row: its next token ids} -> {row: logits [its tokens, V]}."""
        lengths = [len(ids) for ids in chunks.values()]
        return dict(zip(chunks, self.flat_step(chunks).split(lengths)))

    def flat_step(self, chunks, wanted=None):
        """The same, all tokens in a row, or those at the places `wanted`: logits [M, V]."""
        rows, lengths = list(chunks), [len(ids) for ids in chunks.values()]
        starts = [self.seq_lens[row] for row in rows]
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)])
        row_of_token = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        query_start_loc = torch.tensor([0, *lengths]).cumsum(0).int()
        seq_lens = torch.tensor([start + n for start, n in zip(starts, lengths)]).int()
        max_seq_len = int(seq_lens.max())
        plans, kv = [None] * self.config.num_layers, [None] * self.config.num_layers
        for layers, all_tables, pool in self.groups.values():
            tables = all_tables[rows].contiguous()
            slots = tables[row_of_token, positions // self.block_size] * self.block_size + positions % self.block_size
            batch = AttentionBatch(query_start_loc, seq_lens, tables, slots, self.block_size, max(lengths), max_seq_len)
            plan = self.attention.plan(batch)
            for i, layer in enumerate(layers):
                plans[layer], kv[layer] = plan, pool[:, i]
        input_ids = torch.tensor([token for ids in chunks.values() for token in ids])
        with torch.inference_mode():
            wanted_M = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
            hidden = self.model(input_ids, positions, ForwardContext(plans, kv, wanted_M))
            logits = self.model.compute_logits(hidden)
        for row, length in zip(rows, lengths):
            self.seq_lens[row] += length
        return logits


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads, which on a busy machine mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["torch", "cpu"])
def paged_model(request):
    """Builds a `PagedModel` of a directory, once with the reference backend and plain torch, once with the C kernels."""
    try:
        kernels = select_kernels("cpu", request.param)
    except ConfigError as error:  # no C compiler here
        pytest.skip(str(error))

    def build(directory, **options):
        return PagedModel(directory, kernels, select_backend("auto", "cpu", kernels), **options)

    return build
