"""One step through the model: lay the batch out, move blocks, run the layers, draw tokens.

`forward` and `sample` are two calls, so that what restricts the draw (a grammar's mask) can be computed while the layers run.
Does not know the scheduler; it does what a `SchedulerOutput` says, in the order that `core.step` gives.

Shape legend: T = tokens of the step, M = samples, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from quire.attention.base import AttentionBackend
from quire.core.step import Candidates, SchedulerOutput, StepOutput
from quire.layers.context import ForwardContext
from quire.sampling.beams import beam_candidates
from quire.sampling.logprobs import PromptLogprobs, prompt_logprobs
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.sampling.transfer import to_device
from quire.worker.input_batch import FlatBatch, InputBatch
from quire.worker.kv_store import KVStore

if TYPE_CHECKING:
    from quire.worker.graph_runner import GraphRunner


_NO_TOKENS = np.zeros(0, dtype=np.int32)


class Way(Enum):
    """How a step runs: graphs are for decoding or for mixed steps (see `graph_runner`)."""

    DECODE_GRAPH = "decode graph"
    MIXED_GRAPH = "mixed graph"
    EAGER = "eager"


@dataclass(slots=True)
class _Forwarded:
    """A step between its two calls."""

    hidden_MH: Tensor
    prompt_logprobs: dict[int, PromptLogprobs]
    began_s: float
    transfer_s: float
    began: torch.cuda.Event | None


class ModelRunner:
    """The model, what it remembers of each row, and KV memory."""

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionBackend,
        inputs: InputBatch,
        sampling: SamplingState,
        store: KVStore,
    ) -> None:
        self.model = model
        self.attention = attention
        self.inputs = inputs
        self.sampling = sampling
        self.store = store
        self.sampler = Sampler()
        self.graphs: GraphRunner | None = None  # where the device can capture them
        self.way = Way.EAGER  # of the last step that had something to run
        self._forwarded: _Forwarded | None = None
        self._marks: list[torch.cuda.Event] = []  # made for steps that have come back

    @torch.inference_mode()
    def forward(self, step: SchedulerOutput) -> None:
        """Everything up to the hidden states that tokens will be drawn from."""
        assert self._forwarded is None, "forward without sample"
        assert not step.draft_token_ids, "this worker does not verify drafts"
        began_s, began = time.perf_counter(), self._mark()
        self.inputs.apply(step)
        for new in step.new_rows:
            self.sampling.set_row(
                new.row,
                new.params,
                new.seed,
                new.branch,
                new.num_prompt_tokens,
                new.stop_token_ids,
                new.bad_words_token_ids,
            )
            self.sampling.set_beam(new.row, new.num_candidates)
        if step.token_updates is not None:
            decided = step.token_updates
            self.inputs.write_drawn(decided.rows, decided.positions, torch.from_numpy(decided.token_ids))
        moved_s = time.perf_counter()
        for transfer in step.swap_out:
            self.store.swap_out(transfer)
        for transfer in step.swap_in:
            self.store.swap_in(transfer)
        moved_s = time.perf_counter() - moved_s if step.swap_out or step.swap_in else 0.0
        self.store.copy(step.copies)
        if not len(step.rows):
            self._forwarded = _Forwarded(torch.empty(0), {}, began_s, moved_s, began)
            return
        self.way = self._choose_way(step)
        if self.graphs is not None and self.way is not Way.EAGER:
            run = self.graphs.forward if self.way is Way.DECODE_GRAPH else self.graphs.forward_mixed
            self._forwarded = _Forwarded(run(step), {}, began_s, moved_s, began)
            return
        batch = self.inputs.lay_out(step)
        found: dict[int, PromptLogprobs] = {}
        if self._asks_prompt_logprobs(step):
            hidden_TH = self._run_layers(batch, None)
            hidden_MH, found = hidden_TH.index_select(0, batch.last_M), self._prompt_logprobs(step, hidden_TH)
        else:
            hidden_MH = self._run_layers(batch, None if _draws_from_each_token(step) else batch.last_M)
        self._forwarded = _Forwarded(hidden_MH, found, began_s, moved_s, began)

    def _choose_way(self, step: SchedulerOutput) -> Way:
        if self.graphs is None:
            return Way.EAGER
        if self.graphs.takes(step):
            return Way.DECODE_GRAPH
        if self.graphs.takes_mixed(step) and not self._asks_prompt_logprobs(step):
            return Way.MIXED_GRAPH
        return Way.EAGER

    def _asks_prompt_logprobs(self, step: SchedulerOutput) -> bool:
        """They need the hidden states of all positions, which graphs do not make."""
        for row, start in zip(step.rows.tolist(), step.starts.tolist()):
            tenant = self.inputs.rows[row]
            assert tenant is not None
            if tenant.params.prompt_logprobs is not None and start < tenant.num_prompt_tokens - 1:
                return True
        return False

    def _run_layers(self, batch: FlatBatch, wanted_M: Tensor | None) -> Tensor:
        """-> hidden states, of all tokens or of those wanted."""
        plans = [self.attention.plan(attention) for attention in batch.attention]
        store = self.store
        context = ForwardContext([plans[group] for group in store.group_of_layer], store.layers, wanted_M)
        return self.model(batch.input_ids_T, batch.positions_T, context)

    def _prompt_logprobs(self, step: SchedulerOutput, hidden_TH: Tensor) -> dict[int, PromptLogprobs]:
        """Entry -> log probabilities of the prompt tokens that follow its positions, for entries that ask for them."""
        found = {}
        first = 0
        for entry, (row, start, count) in enumerate(zip(step.rows, step.starts, step.num_tokens)):
            tenant = self.inputs.rows[row]
            assert tenant is not None
            asked = tenant.params.prompt_logprobs
            if asked is not None and start < tenant.num_prompt_tokens - 1:
                end = min(start + count, tenant.num_prompt_tokens - 1)
                targets = self.inputs.token_ids_RL[row, start + 1 : end + 1].long()
                hidden = hidden_TH[first : first + end - start]
                found[entry] = prompt_logprobs(hidden, self.model.compute_logits, targets, asked)
            first += int(count)
        return found

    def sample(self, step: SchedulerOutput) -> StepOutput:
        """Draws the step's tokens and writes them into their rows."""
        return self.launch_sample(step)()

    @torch.inference_mode()
    def launch_sample(self, step: SchedulerOutput) -> Callable[[], StepOutput]:
        """`sample` in two parts: what is returned waits for this step's tokens, and no later step's, and gives the result."""
        forwarded, self._forwarded = self._forwarded, None
        assert forwarded is not None, "sample without forward"
        result = StepOutput(
            step.step_id,
            _NO_TOKENS,
            prompt_logprobs=forwarded.prompt_logprobs,
            finished_transfers=[transfer.transfer_id for transfer in (*step.swap_out, *step.swap_in)],
            transfer_s=forwarded.transfer_s,
        )
        transfers_end = self.store.transfers_launched()
        drawn = None
        if len(step.sample_rows):
            drawn = self.graphs.sample(step) if self.graphs is not None else None
            if drawn is None:
                logits_MV = self._logits(step, forwarded.hidden_MH)
                drawn = self.sampler.sample(
                    logits_MV, self.sampling, step.sample_rows, step.sample_positions, self.inputs.token_ids_RL
                )
                self.inputs.write_drawn(step.sample_rows, step.sample_positions, drawn.token_ids_M)
                drawn.send()
                result.candidates = self._candidates(step, logits_MV)

        ended = self._mark()

        def finish() -> StepOutput:
            if drawn is not None:
                result.token_ids = drawn.host_token_ids
                if drawn.errors:
                    result.errors = dict(drawn.errors)
                if drawn.logprobs is not None:
                    result.logprobs = {i: row for i, row in enumerate(drawn.logprobs) if row is not None}
            if ended is not None and forwarded.began is not None:
                # By the device's clock, for the host's counts the steps before that were still running. Transfers run beside
                # the step: they are added, so that what is left without them is the step.
                ended.synchronize()
                result.transfer_s = transfers_end()
                result.elapsed_s = forwarded.began.elapsed_time(ended) / 1e3 + result.transfer_s
                self._marks += (forwarded.began, ended)
            else:
                result.elapsed_s = time.perf_counter() - forwarded.began_s
            return result

        return finish

    def _mark(self) -> torch.cuda.Event | None:
        """A time on the device, where it has a clock of its own."""
        if self.inputs.device.type != "cuda":
            return None
        event = self._marks.pop() if self._marks else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _candidates(self, step: SchedulerOutput, logits_MV: Tensor) -> dict[int, Candidates]:
        """Of the samples that are beams: they draw nothing, their group decides."""
        beams = np.flatnonzero(self.sampling.num_candidates_R[step.sample_rows])
        if not len(beams):
            return {}
        found = beam_candidates(
            logits_MV.index_select(0, torch.from_numpy(beams).to(logits_MV.device)),
            self.sampling,
            step.sample_rows[beams],
            step.sample_positions[beams],
            self.inputs.token_ids_RL,
        )
        return dict(zip(beams.tolist(), found))

    def _logits(self, step: SchedulerOutput, hidden_MH: Tensor) -> Tensor:
        """Logits of the samples; those that share an entry share a row of the product."""
        entries, index = np.unique(step.sample_entries, return_inverse=True)
        if len(entries) == len(step.sample_entries):
            return self.model.compute_logits(hidden_MH)
        first = np.zeros(len(entries), dtype=np.int64)
        first[index[::-1]] = np.arange(len(index))[::-1]
        logits = self.model.compute_logits(hidden_MH.index_select(0, to_device(first, hidden_MH.device)))
        return logits.index_select(0, to_device(index.astype(np.int64), hidden_MH.device))


def _draws_from_each_token(step: SchedulerOutput) -> bool:
    """Whether the samples are the step's tokens, one after the other: mostly so where it only decodes."""
    num_tokens = int(step.num_tokens.sum())
    return num_tokens == len(step.sample_entries) and np.array_equal(step.sample_entries, np.arange(num_tokens))
