"""Steps over fixed buffers, and laid out by kernels, give what the plain way gives: in Triton's interpreter, where "replaying
a graph" is calling the captured function again. The same on a card, with graphs, is in tests/engine/test_gpu.py."""

from triton_interpreter import HAS_CUDA  # isort: skip

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, BeamSearchParams, SamplingParams
from quire.core.cache_group import CacheGroup
from quire.core.step import NewRow, SchedulerOutput, TableUpdate
from quire.kernels.triton.ops import most_few_tokens
from quire.worker.graph_runner import GraphRunner
from quire.worker.graph_sizes import graph_sizes, mixed_sizes
from quire.worker.input_batch import InputBatch, PackedInputBatch, Packing, joined_updates
from quire.worker.model_runner import Way
from support import assert_nothing_leaked

pytestmark = [
    pytest.mark.skipif(HAS_CUDA, reason="there are real graphs here"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def again(function: Any) -> tuple[Any, torch.Tensor]:
    """Captures nothing; to replay is to write the function's new result where its first one was."""
    result = function()
    return lambda: result.copy_(function()), result


OPTIONS: dict[str, Any] = {
    "load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 6, "block_size": 4,
    "num_gpu_blocks_override": 60, "max_model_len": 64,
}  # fmt: skip
PROMPTS = [[3 + (i * j) % 90 for j in range(1, 4 + 3 * i)] for i in range(1, 5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=3, logprobs=2, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
    SamplingParams(n=2, seed=3, max_tokens=6, top_p=0.9, top_k=40, ignore_eos=True),
    SamplingParams(seed=4, max_tokens=5, temperature=0.8, ignore_eos=True),
]


def answers(model: Path, *, graphs: str = "", mixed: int = 0, **options: Any) -> list[list[int]]:
    with LLM(str(model), **OPTIONS, **options) as llm:
        runner = llm.engine.executor.worker.runner
        if graphs:
            worker = llm.engine.executor.worker
            runner.graphs = GraphRunner(
                runner.model, runner.attention, runner.inputs, runner.sampling, runner.store,
                runner.model.attention_specs, worker._dtype, capture=again, max_num_tokens=mixed,
            )  # fmt: skip
            if graphs == "captured":
                runner.graphs.capture_all()
                assert runner.graphs.num_captures == 2 * len(runner.graphs.sizes.decode) + len(
                    runner.graphs.sizes.mixed
                )
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert_nothing_leaked(llm.engine)
        if options.get("attention_backend") == "triton":
            report = llm.engine.executor.device_report
            assert (report.attention_backend, report.kernels, runner.sampler.name) == ("triton", "triton", "triton")
        if graphs:
            assert runner.graphs.num_replays > 0
            assert runner.graphs.num_captures >= 2
            assert (runner.graphs.num_mixed_replays > 0) == (mixed > 0)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(
    ("graphs", "options"),
    [
        ("", {}),
        ("", {"max_num_batched_tokens": 7}),
        ("lazy", {}),
        ("captured", {"mixed": 64}),
        ("lazy", {"mixed": 7, "max_num_batched_tokens": 7}),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_plain_way(tiny_model: Path, graphs: str, options: dict[str, Any]) -> None:
    expected = answers(tiny_model)
    assert answers(tiny_model, attention_backend="triton", graphs=graphs, **options) == expected


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 4]
    assert graph_sizes(6) == [1, 2, 4, 16]
    assert graph_sizes(2, few=1) == graph_sizes(16, few=1) == [1, 16]
    assert graph_sizes(1, few=1) == [1]
    assert (most_few_tokens(2048), most_few_tokens(4096)) == (4, 1)
    assert graph_sizes(256)[-5:] == [160, 192, 208, 224, 256]
    assert graph_sizes(10_000)[-1] == 512
    assert mixed_sizes(0) == []
    assert mixed_sizes(7) == [7]
    assert mixed_sizes(64) == [16, 32, 64]
    assert mixed_sizes(2048)[-2:] == [1792, 2048]
    assert mixed_sizes(8192)[-3:] == [6144, 7168, 8192]
    assert mixed_sizes(10_000)[-1] == 8192
    assert len(mixed_sizes(8192)) == 25


BEAMS = BeamSearchParams(beam_width=2, max_tokens=5)


def outputs_with_extras(model: Path, *, graphs: bool) -> tuple[list[Any], list[Any]]:
    """Answers with what graphs leave to others (prompt log probabilities, beams, masks), and the ways that steps ran."""
    options = OPTIONS | {"max_num_batched_tokens": 9, "enable_prefix_caching": False}
    with LLM(str(model), **options, attention_backend="triton" if graphs else "auto") as llm:
        worker = llm.engine.executor.worker
        runner = worker.runner
        if graphs:
            runner.graphs = GraphRunner(
                runner.model, runner.attention, runner.inputs, runner.sampling, runner.store,
                runner.model.attention_specs, worker._dtype, capture=again, max_num_tokens=9, few=1,
            )  # fmt: skip
            assert runner.graphs.sizes.decode == [1, 16]
            runner.graphs.capture_all()
        ways = []
        forward = runner.forward

        def watched_forward(step: SchedulerOutput) -> None:
            forward(step)
            ways.append(runner.way)

        runner.forward = watched_forward
        asking = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
        masked = SamplingParams(seed=1, max_tokens=6, allowed_token_ids=[5, 9, 33, 71], logprobs=1, ignore_eos=True)
        outputs = llm.generate(PROMPTS, [PARAMS[1], asking, masked, PARAMS[2]], use_tqdm=False)
        searched = llm.beam_search(PROMPTS[:2], BEAMS, use_tqdm=False)
        assert_nothing_leaked(llm.engine)
    found: list[Any] = [[list(completion.token_ids) for completion in output.outputs] for output in outputs]
    logprobs = [
        [None if entry is None else {i: round(e.logprob, 3) for i, e in entry.items()} for entry in entries]
        for entries in (outputs[1].prompt_logprobs, outputs[2].outputs[0].logprobs)
    ]
    beams = [[list(sequence.tokens) for sequence in output.sequences] for output in searched]
    return [found, logprobs, beams], ways


def test_what_mixed_graphs_do_not_keep_is_right(tiny_model: Path) -> None:
    expected, _ = outputs_with_extras(tiny_model, graphs=False)
    found, ways = outputs_with_extras(tiny_model, graphs=True)
    assert found == expected
    assert set(ways) == set(Way)


@pytest.mark.parametrize("seed", range(2))
def test_random_mixed_steps_leave_the_same_tokens_and_cache(tiny_model: Path, seed: int) -> None:
    """Chunks of prompts and decoding rows, some without a sample, some with several: hidden states, KV memory and drawn tokens
    are the plain way's, whatever the padding."""
    rng = np.random.default_rng(seed)
    workers = []
    for graphs in (False, True):
        llm = LLM(str(tiny_model), **OPTIONS, attention_backend="triton")
        worker = llm.engine.executor.worker
        if graphs:
            runner = worker.runner
            runner.graphs = GraphRunner(
                runner.model, runner.attention, runner.inputs, runner.sampling, runner.store,
                runner.model.attention_specs, worker._dtype, capture=again, max_num_tokens=40,
            )  # fmt: skip
            if seed == 0:
                runner.graphs.capture_all()
        worker.runner.store.blocks_BG2HSD.zero_()
        workers.append(worker)
    num_groups = len(workers[0].runner.inputs.tables_RB)
    done = [0] * 5
    new_rows = [
        NewRow(
            row, rng.integers(3, 90, 50, dtype=np.int32), 50, SamplingParams(seed=row, temperature=row % 2), row, 0, ()
        )
        for row in range(5)
    ]
    blocks = rng.permutation(np.arange(1, 61, dtype=np.int32))[: 5 * 12].reshape(5, 12)
    update = TableUpdate(
        np.repeat(np.arange(5, dtype=np.int32), 12), np.tile(np.arange(12, dtype=np.int32), 5), blocks.ravel()
    )
    more: dict[str, Any] = {"new_rows": new_rows, "table_updates": [[update]] * num_groups}
    for _ in range(6):
        rows = sorted(rng.choice(5, rng.integers(1, 6), replace=False).tolist(), key=lambda row: hash((seed, row)))
        counts = [int(rng.choice([1, 1, 2, 5, 8])) for _ in rows]
        counts = [min(count, 47 - done[row]) for row, count in zip(rows, counts)]
        step = step_of(rows, [done[row] for row in rows], counts, **more)
        more = {}
        sampled = np.flatnonzero(rng.random(len(rows)) < 0.7)
        entries = np.repeat(sampled, rng.integers(1, 3, len(sampled)))[:6].astype(np.int32)
        step.sample_entries, step.sample_rows = entries, step.rows[entries]
        step.sample_positions = (step.starts + step.num_tokens)[entries]
        for row, count in zip(rows, counts):
            done[row] += count
        results, hidden = [], []
        for worker in workers:
            worker.forward(step)
            hidden.append(worker.runner._forwarded.hidden_MH.clone())
            results.append(worker.sample(step))
        assert workers[1].runner.way is not Way.EAGER
        torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
        assert results[1].token_ids.tolist() == results[0].token_ids.tolist()
        assert results[1].errors == results[0].errors == {}
        plain, graphed = (worker.runner for worker in workers)
        torch.testing.assert_close(graphed.store.blocks_BG2HSD[1:], plain.store.blocks_BG2HSD[1:], rtol=1e-4, atol=1e-5)
        assert torch.equal(graphed.inputs.token_ids_RL[:5, :50], plain.inputs.token_ids_RL[:5, :50])
    assert workers[1].runner.graphs.num_mixed_replays >= 2


def step_of(rows: list[int], starts: list[int], counts: list[int], **more: Any) -> SchedulerOutput:
    arrays = (np.array(values, dtype=np.int32) for values in (rows, starts, counts))
    entries = np.arange(len(rows), dtype=np.int32)
    positions = np.array(starts, dtype=np.int32) + np.array(counts, dtype=np.int32)
    return SchedulerOutput(1, *arrays, entries, np.array(rows, dtype=np.int32), positions, **more)


def test_a_packed_batch_is_laid_out_like_a_plain_one() -> None:
    groups = [CacheGroup((0,), None, 1, 8, "float32"), CacheGroup((1,), 8, 1, 8, "float32")]
    batches = [kind(5, 40, 4, groups, torch.device("cpu")) for kind in (InputBatch, PackedInputBatch)]
    rng = np.random.default_rng(0)
    new_rows = [
        NewRow(row, rng.integers(0, 90, 30, dtype=np.int32), 20, SamplingParams(), 0, 0, ()) for row in (0, 2, 4)
    ]
    update = [TableUpdate(*(rng.integers(0, high, 50, dtype=np.int32) for high in (5, 10, 99))) for _ in range(3)]
    step = step_of([4, 0, 2], [11, 0, 3], [1, 9, 5], new_rows=new_rows, table_updates=[update[:2], update[2:]])
    flat = []
    for batch in batches:
        batch.apply(step)
        flat.append(batch.lay_out(step))
    plain, packed = flat
    assert packed.input_ids_T.tolist() == plain.input_ids_T.tolist()
    assert packed.positions_T.tolist() == plain.positions_T.tolist()
    assert packed.last_M.tolist() == plain.last_M.tolist()
    for a, b in zip(packed.attention, plain.attention):
        assert a.slots_T.tolist() == b.slots_T.tolist()
        assert a.query_start_loc_S1.tolist() == b.query_start_loc_S1.tolist()
        assert a.seq_lens_S.tolist() == b.seq_lens_S.tolist()
        for s, length in enumerate(b.seq_lens_S.tolist()):
            used = -(-length // 4)
            assert a.block_tables_SB[s, :used].tolist() == b.block_tables_SB[s, :used].tolist()
    for packed_RB, plain_RB in zip(batches[1].tables_RB, batches[0].tables_RB):
        assert torch.equal(packed_RB[:5], plain_RB)


def test_table_entries_change_without_a_batch() -> None:
    groups = [CacheGroup((0,), None, 1, 8, "float32")]
    batch = PackedInputBatch(5, 40, 4, groups, torch.device("cpu"))
    update = TableUpdate(*(np.array(values, dtype=np.int32) for values in ([3], [1], [17])))
    batch.apply(step_of([], [], [], table_updates=[[update]]))
    assert batch.tables_RB[0][3, 1] == 17


def test_later_table_updates_win() -> None:
    first, second = (
        TableUpdate(*(np.array(values, dtype=np.int32) for values in columns))
        for columns in (([1, 2, 1], [0, 5, 0], [7, 8, 9]), ([2, 3], [5, 5], [10, 11]))
    )
    joined = joined_updates([first, second], 10)
    assert {(int(row), int(column)): int(block) for row, column, block in joined.T} == {
        (1, 0): 9,
        (2, 5): 10,
        (3, 5): 11,
    }
    assert joined.shape == (3, 3)
    assert joined_updates([], 10).shape == (3, 0)


def test_packing_aligns_to_16_bytes() -> None:
    packing = Packing({"rows": 3, "seq_lens": 5})
    assert (packing.slices, packing.num_words) == ({"rows": slice(0, 3), "seq_lens": slice(4, 9)}, 12)
