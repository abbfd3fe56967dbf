"""One step through the model: lay the batch out, move blocks, run the layers, draw tokens.

`forward` and `sample` are two calls, so that what restricts the draw (a grammar's mask) can be computed while the layers run.
Does not know the scheduler; it does what a `SchedulerOutput` says, in the order that `core.step` gives.

Shape legend: T = tokens of the step, M = samples, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quire.attention.base import AttentionBackend
from quire.core.step import SchedulerOutput, StepOutput
from quire.layers.context import ForwardContext
from quire.sampling.logprobs import PromptLogprobs, prompt_logprobs
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.worker.input_batch import FlatBatch, InputBatch
from quire.worker.kv_store import KVStore


@dataclass(slots=True)
class _Forwarded:
    """A step between its two calls."""

    hidden_MH: Tensor
    prompt_logprobs: dict[int, PromptLogprobs]
    began_s: float


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
        self._forwarded: _Forwarded | None = None

    @torch.inference_mode()
    def forward(self, step: SchedulerOutput) -> None:
        """Everything up to the hidden states that tokens will be drawn from."""
        assert self._forwarded is None, "forward without sample"
        assert not step.draft_token_ids, "this worker does not verify drafts"
        began_s = time.perf_counter()
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
        for transfer in step.swap_out:
            self.store.swap_out(transfer)
        for transfer in step.swap_in:
            self.store.swap_in(transfer)
        self.store.copy(step.copies)
        if not len(step.rows):
            self._forwarded = _Forwarded(torch.empty(0), {}, began_s)
            return
        batch = self.inputs.lay_out(step)
        hidden_TH = self._run_layers(batch)
        self._forwarded = _Forwarded(
            hidden_TH.index_select(0, batch.last_M), self._prompt_logprobs(step, hidden_TH), began_s
        )

    def _run_layers(self, batch: FlatBatch) -> Tensor:
        plans = [self.attention.plan(attention) for attention in batch.attention]
        store = self.store
        context = ForwardContext(plans=[plans[group] for group in store.group_of_layer], kv=store.layers)
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

    @torch.inference_mode()
    def sample(self, step: SchedulerOutput) -> StepOutput:
        """Draws the step's tokens and writes them into their rows."""
        forwarded, self._forwarded = self._forwarded, None
        assert forwarded is not None, "sample without forward"
        transfers = [transfer.transfer_id for transfer in (*step.swap_out, *step.swap_in)]
        result = StepOutput(
            step.step_id,
            np.zeros(0, dtype=np.int32),
            prompt_logprobs=dict(forwarded.prompt_logprobs),
            finished_transfers=transfers,
        )
        if len(step.sample_rows):
            logits_MV = self._logits(step, forwarded.hidden_MH)
            drawn = self.sampler.sample(
                logits_MV, self.sampling, step.sample_rows, step.sample_positions, self.inputs.token_ids_RL
            )
            self.inputs.write_drawn(step.sample_rows, step.sample_positions, drawn.token_ids_M)
            result.token_ids = drawn.token_ids_M.cpu().numpy().astype(np.int32)
            result.errors = dict(drawn.errors)
            if drawn.logprobs is not None:
                result.logprobs = {i: row for i, row in enumerate(drawn.logprobs) if row is not None}
        result.elapsed_s = time.perf_counter() - forwarded.began_s
        return result

    def _logits(self, step: SchedulerOutput, hidden_MH: Tensor) -> Tensor:
        """Logits of the samples; those that share an entry share a row of the product."""
        entries, index = np.unique(step.sample_entries, return_inverse=True)
        if len(entries) == len(step.sample_entries):
            return self.model.compute_logits(hidden_MH)
        first = np.zeros(len(entries), dtype=np.int64)
        first[index[::-1]] = np.arange(len(index))[::-1]
        logits = self.model.compute_logits(hidden_MH.index_select(0, torch.from_numpy(first).to(hidden_MH.device)))
        return logits.index_select(0, torch.from_numpy(index.astype(np.int64)).to(hidden_MH.device))
