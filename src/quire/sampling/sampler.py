"""Logits in, one token for each entry out. The order in which parameters apply is this file.

    raw logits ─┬─ log probabilities, for entries that ask for them
                └─ allowed ids, bad words, min_tokens, bias, repetition, frequency and presence penalty
                     ├─ greedy: the largest, the lowest id among equals
                     └─ random: temperature, softmax, min-p, top-k, top-p, draw

An entry is a row of the batch at a position of its sequence. What an entry draws depends on its own logits, parameters and
tokens, never on the rest of the batch. The sampler knows neither the scheduler nor who stops when, and keeps nothing
between steps: what a sequence has is in `SamplingState`, by row.

Shape legend: M = entries, V = vocabulary, R = rows, L = max_model_len, P = entries that use the thing at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quire.sampling.draw import draw, draw_truncated
from quire.sampling.logprobs import LogprobsTensors, RowLogprobs, gather_logprobs
from quire.sampling.penalties import apply_allowed, apply_counts, apply_edits, apply_repetition
from quire.sampling.random import uniform
from quire.sampling.state import Column, SamplingState, Use
from quire.sampling.transfer import ToHost, to_device

_OK, _NOT_FINITE, _NONE_ALLOWED = 0, 1, 2
_MESSAGES = {
    _NOT_FINITE: "the model's logits are not finite (NaN or infinite), so no token can be drawn",
    _NONE_ALLOWED: "no token is allowed here: allowed_token_ids, bad_words, logit_bias and min_tokens ban them all",
}


@dataclass
class SamplerOutput:
    """token_ids_M: int64, on the device; 0 for an entry in error.

    `host_token_ids`, `errors` and `logprobs` wait for the device when read: for `send`'s copy alone if that was called, else
    for all that was launched by then.
    """

    token_ids_M: Tensor
    _codes_M: Tensor
    _logprobs: LogprobsTensors | None = None
    _logprobs_entries: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _num_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _sent: ToHost | None = None
    _sent_logprobs: ToHost | None = None

    def send(self) -> None:
        """Starts the copies to the host, without waiting for them."""
        if self._sent is None:
            self._sent = ToHost(torch.stack((self.token_ids_M, self._codes_M.to(self.token_ids_M.dtype))))
        if self._logprobs is not None and self._sent_logprobs is None:
            logprobs = self._logprobs
            self._sent_logprobs = ToHost(logprobs.token_ids_NK1, logprobs.logprobs_NK1, logprobs.rank_N)

    @cached_property
    def _host_2M(self) -> np.ndarray:
        """Tokens, then codes."""
        self.send()
        assert self._sent is not None
        return self._sent.wait()[0].numpy()[:, : len(self.token_ids_M)]  # a graph's copy may be wider

    @property
    def host_token_ids(self) -> np.ndarray:
        """token_ids_M as int32, on the host."""
        return self._host_2M[0].astype(np.int32)

    @cached_property
    def errors(self) -> list[tuple[int, str]]:
        """(entry, message) of the entries that no token could be drawn for; the others are unharmed."""
        codes_M = self._host_2M[1]
        return [(int(i), _MESSAGES[int(codes_M[i])]) for i in np.flatnonzero(codes_M)]

    @cached_property
    def logprobs(self) -> list[RowLogprobs | None] | None:
        """For each entry that asked for k: k + 1 tokens, the drawn one first. None where no entry asked."""
        if self._logprobs is None:
            return None
        self.send()
        assert self._sent_logprobs is not None
        host = LogprobsTensors(*self._sent_logprobs.wait()).to_host()
        rows: list[RowLogprobs | None] = [None] * len(self.token_ids_M)
        for n, (i, k) in enumerate(zip(self._logprobs_entries, self._num_logprobs)):
            rows[i] = RowLogprobs(*(of_all[n, : k + 1] for of_all in host))
        return rows


class Chooser(Protocol):
    """What of sampling has kernels of its own on a GPU. `name` tells whose they are."""

    name: str

    def choose(
        self,
        logits_MV: Tensor,
        state: SamplingState,
        rows_M: np.ndarray,
        positions_M: np.ndarray,
        uses_M: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Greedy or random choice from logits after all edits: token_ids_M (int64, 0 where in error), codes_M (int8)."""
        ...

    def logprobs(self, logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobsTensors:
        """`gather_logprobs`."""
        ...


class TorchChooser:
    """The choice in plain torch, on any device."""

    name = "torch"

    def choose(
        self,
        logits_MV: Tensor,
        state: SamplingState,
        rows_M: np.ndarray,
        positions_M: np.ndarray,
        uses_M: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        random, greedy = _entries(uses_M, Use.RANDOM), np.flatnonzero(uses_M & Use.RANDOM == 0)
        token_ids_M = torch.zeros(len(rows_M), dtype=torch.int64, device=state.device)
        codes_M = torch.zeros(len(rows_M), dtype=torch.int8, device=state.device)
        for entries, choose in ((greedy, _choose_greedy), (random, _choose_random)):
            if len(entries):
                whole = len(entries) == len(rows_M)
                index_P = None if whole else torch.from_numpy(entries).to(state.device)
                chosen_MV = logits_MV if index_P is None else logits_MV.index_select(0, index_P)
                token_ids_P, finite_P = choose(chosen_MV, state, rows_M[entries], positions_M[entries], uses_M[entries])
                codes_P = torch.where(finite_P, _OK, _NOT_FINITE).to(torch.int8)
                token_ids_P = token_ids_P.masked_fill(~finite_P, 0)
                if index_P is None:
                    token_ids_M, codes_M = token_ids_P, codes_P
                else:
                    token_ids_M[index_P], codes_M[index_P] = token_ids_P, codes_P
        return token_ids_M, codes_M

    def logprobs(self, logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobsTensors:
        return gather_logprobs(logits_NV, chosen_N, k)


class Sampler:
    """Keeps nothing but its chooser."""

    def __init__(self, chooser: Chooser | None = None) -> None:
        self._chooser = chooser or TorchChooser()

    @property
    def name(self) -> str:
        return self._chooser.name

    @torch.inference_mode()
    def sample(
        self,
        logits_MV: Tensor,
        state: SamplingState,
        rows_M: np.ndarray,
        positions_M: np.ndarray,
        token_ids_RL: Tensor,
    ) -> SamplerOutput:
        """Draw one token for each entry.

        logits_MV: float32, left as it is. rows_M: integers on the host, rows of `state`; a row may occur more than once.
        positions_M: integers on the host, the index in its sequence of the token to be drawn, which is the number of known
        tokens. token_ids_RL: int32 on the device, known tokens of each row: the prompt in [0, prompt_len), the output in
        [prompt_len, position); what lies behind is not looked at.
        """
        uses_M = state.uses_R[rows_M]
        used = int(np.bitwise_or.reduce(uses_M, initial=0))
        edited_MV = logits_MV
        if used & (Use.REPETITION | Use.COUNTS | Use.EDIT | Use.ALLOWED):
            edited_MV = logits_MV.clone()
            edit_logits(edited_MV, state, rows_M, positions_M, token_ids_RL, uses_M)

        token_ids_M, codes_M = self._chooser.choose(edited_MV, state, rows_M, positions_M, uses_M)
        if used & (Use.EDIT | Use.ALLOWED):
            codes_M = codes_M.masked_fill(edited_MV.amax(-1) == -torch.inf, _NONE_ALLOWED)

        output = SamplerOutput(token_ids_M, codes_M)
        if used & Use.LOGPROBS:
            entries = _entries(uses_M, Use.LOGPROBS)
            index_P = to_device(entries, state.device)
            output._logprobs_entries, output._num_logprobs = entries, state.num_logprobs_R[rows_M[entries]]
            output._logprobs = self._chooser.logprobs(
                logits_MV.index_select(0, index_P), token_ids_M[index_P], int(output._num_logprobs.max())
            )
        return output


def _entries(uses_M: np.ndarray, use: Use) -> np.ndarray:
    return np.flatnonzero(uses_M & use)


def edit_logits(
    logits_MV: Tensor,
    state: SamplingState,
    rows_M: np.ndarray,
    positions_M: np.ndarray,
    token_ids_RL: Tensor,
    uses_M: np.ndarray,
) -> None:
    """Masks, bias and penalties, in place."""
    if len(entries := _entries(uses_M, Use.ALLOWED)):
        apply_allowed(logits_MV, state, rows_M, entries)
    if len(entries := _entries(uses_M, Use.EDIT)):
        apply_edits(logits_MV, state, rows_M, positions_M, token_ids_RL, entries)
    for use in (Use.REPETITION, Use.COUNTS):
        if not len(entries := _entries(uses_M, use)):
            continue
        index_P, rows_P, position_P = (
            to_device(np.asarray(of_entry, np.int64), state.device)
            for of_entry in (entries, rows_M[entries], positions_M[entries])
        )
        known = int(positions_M[entries].max())
        token_ids_PL = token_ids_RL[:, :known].index_select(0, rows_P).long()
        params_PC = state.params_RC.index_select(0, rows_P)
        logits_PV = logits_MV.index_select(0, index_P)
        if use is Use.REPETITION:
            apply_repetition(logits_PV, token_ids_PL, position_P, params_PC[:, Column.REPETITION])
        else:
            apply_counts(
                logits_PV,
                token_ids_PL,
                params_PC[:, Column.PROMPT_LEN],
                position_P,
                params_PC[:, Column.FREQUENCY],
                params_PC[:, Column.PRESENCE],
            )
        logits_MV[index_P] = logits_PV


def _choose_greedy(
    logits_PV: Tensor, state: SamplingState, rows_P: np.ndarray, positions_P: np.ndarray, uses_P: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Returns token_ids_P, and finite_P: bool, False where there is none. argmax takes NaN for the largest of all."""
    token_ids_P = logits_PV.argmax(-1)
    return token_ids_P, logits_PV.gather(1, token_ids_P[:, None]).squeeze(1).isfinite()


def _choose_random(
    logits_PV: Tensor, state: SamplingState, rows_P: np.ndarray, positions_P: np.ndarray, uses_P: np.ndarray
) -> tuple[Tensor, Tensor]:
    """As `_choose_greedy`. NaN, +inf or nothing but -inf makes the softmax of a row NaN, so its total tells."""
    u_P = torch.from_numpy(uniform(state.seed_R[rows_P], state.branch_R[rows_P], positions_P)).to(state.device)
    used = int(np.bitwise_or.reduce(uses_P))
    if not used & (Use.TEMPERATURE | Use.TRUNCATE):
        token_ids_P, total_P = draw(logits_PV.softmax(-1), u_P)
        return token_ids_P, total_P.isfinite()
    params_PC = state.params_RC.index_select(0, torch.from_numpy(np.asarray(rows_P, np.int64)).to(state.device))
    # softmax works row by row, whatever their number, as nothing else that is fast does.
    probs_PV = (logits_PV * params_PC[:, Column.INVERSE_TEMPERATURE, None]).softmax(-1)
    if not used & Use.TRUNCATE:
        token_ids_P, total_P = draw(probs_PV, u_P)
        return token_ids_P, total_P.isfinite()
    cut = _entries(uses_P, Use.TRUNCATE)
    index_P = torch.from_numpy(cut).to(state.device)
    if len(cut) < len(rows_P):
        token_ids_P, total_P = draw(probs_PV, u_P)
        probs_PV, u_P, params_PC = (of_row.index_select(0, index_P) for of_row in (probs_PV, u_P, params_PC))
    else:
        token_ids_P, total_P = torch.empty_like(index_P), torch.empty_like(u_P)
    token_ids_P[index_P], total_P[index_P] = draw_truncated(
        probs_PV,
        u_P,
        params_PC[:, Column.TOP_K],
        params_PC[:, Column.TOP_P],
        params_PC[:, Column.MIN_P],
        narrow=bool(used & Use.NUCLEUS),
    )
    return token_ids_P, total_P.isfinite()
