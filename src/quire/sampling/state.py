"""The sampling parameters of the sequences in the batch, by row, on the device.

A sequence has a row for life: its parameters travel to the device once, when it gets the row, and a step sends nothing but
row numbers. What each row *uses* is kept on the host as bits, so a batch that does not use a feature skips it without
asking the device. This module knows neither logits nor the order in which parameters apply; that is `sampler.py`.

Shape legend: R = rows (max_num_seqs), C = parameter columns, B = banned words, W = longest banned word less its last token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

import numpy as np
import torch
from torch import Tensor

from quire.sampling.transfer import write
from quire.sampling_params import SamplingParams


class Use(IntFlag):
    """What a row needs beyond the draw itself."""

    RANDOM = 1  # a draw; otherwise greedy
    TEMPERATURE = 2  # other than 1
    TRUNCATE = 4  # top-k, top-p or min-p
    REPETITION = 8
    COUNTS = 16  # frequency or presence penalty
    EDIT = 32  # logit bias, bad words, min_tokens
    ALLOWED = 64
    LOGPROBS = 128
    NUCLEUS = 256  # top-p alone, which has no cheap bound on what it keeps


class Column(IntEnum):
    """Columns of `SamplingState.params_RC`."""

    INVERSE_TEMPERATURE = 0
    TOP_K = 1  # exact in float32, since no vocabulary has 2**24 tokens
    TOP_P = 2
    MIN_P = 3
    REPETITION = 4
    FREQUENCY = 5
    PRESENCE = 6
    PROMPT_LEN = 7  # exact likewise


@dataclass
class BannedWords:
    """Words of one row as (prefix, last token), on the device: with the prefix just drawn, the last token is banned.

    prefix_BW: int32, right-aligned, -1 on the left where a word is shorter. prefix_len_B, last_B: int64.
    """

    prefix_BW: Tensor
    prefix_len_B: Tensor
    last_B: Tensor


@dataclass
class RowExtras:
    """The rare things of one row: host arrays are joined for the whole batch and sent in one copy."""

    bias_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    bias: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    stop_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # banned until min_tokens
    min_tokens: int = 0
    banned_words: BannedWords | None = None
    forbidden_V: Tensor | None = None  # bool, the complement of allowed_token_ids


_NO_EXTRAS = RowExtras()


class SamplingState:
    """Parameters of every row. `set_row` when a sequence gets the row, `clear_row` when it leaves.

    max_num_seqs: rows. vocab_size: the width of the logits.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        assert vocab_size < 1 << 24
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.params_RC = torch.zeros(max_num_seqs, len(Column), dtype=torch.float32, device=self.device)
        # On the host, for decisions and for the uniforms, which cost less to make there than to launch.
        self.uses_R = np.zeros(max_num_seqs, np.int32)
        self.seed_branch_R2 = np.zeros((max_num_seqs, 2), np.uint64)  # side by side, since draws always need both
        self.seed_R, self.branch_R = self.seed_branch_R2[:, 0], self.seed_branch_R2[:, 1]
        self.prompt_len_R = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs_R = np.full(max_num_seqs, -1, np.int64)  # -1: none asked
        self.num_candidates_R = np.zeros(max_num_seqs, np.int64)  # above 0: a beam
        self.beam_uses_R = np.zeros(max_num_seqs, np.int32)
        self.extras: list[RowExtras] = [_NO_EXTRAS] * max_num_seqs

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        branch: int,
        prompt_len: int,
        eos_token_ids: Collection[int] = (),
        bad_words_token_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """Give `row` to a sequence.

        params: verified against this vocabulary. seed: any int; its low 64 bits count. branch: which of the request's
        sequences. prompt_len: tokens; what comes after is output. bad_words_token_ids: params.bad_words, tokenized.
        """
        greedy = params.is_greedy
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        truncates = top_k < self.vocab_size or params.top_p < 1.0 or params.min_p > 0.0
        of_row = [
            1.0 if greedy else 1.0 / params.temperature,
            top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            prompt_len,
        ]
        write(of_row, self.params_RC[row])
        self.seed_R[row] = seed & 0xFFFFFFFFFFFFFFFF
        self.branch_R[row] = branch
        self.prompt_len_R[row] = prompt_len
        self.extras[row] = extras = self._extras(params, eos_token_ids, bad_words_token_ids)
        logprobs = -1 if params.logprobs is None else params.logprobs if params.logprobs >= 0 else self.vocab_size
        self.num_logprobs_R[row] = min(logprobs, self.vocab_size)
        edits = len(extras.bias_ids) or len(extras.stop_ids) or extras.banned_words is not None
        self.uses_R[row] = (
            Use.RANDOM * (not greedy)
            | Use.TEMPERATURE * (not greedy and params.temperature != 1.0)
            | Use.TRUNCATE * (not greedy and truncates)
            | Use.NUCLEUS * (not greedy and params.top_p < 1.0 and top_k == self.vocab_size and params.min_p == 0.0)
            | Use.REPETITION * (params.repetition_penalty != 1.0)
            | Use.COUNTS * (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0)
            | Use.EDIT * bool(edits)
            | Use.ALLOWED * (extras.forbidden_V is not None)
            | Use.LOGPROBS * (params.logprobs is not None)
        )

    def set_beam(self, row: int, num_candidates: int) -> None:
        """After `set_row`: the row is a beam that gives so many candidates and draws nothing; with 0 it is not."""
        self.num_candidates_R[row] = num_candidates
        if num_candidates:
            self.beam_uses_R[row], self.uses_R[row] = self.uses_R[row], 0

    def clear_row(self, row: int) -> None:
        """Forget the sequence in `row`, so that its tensors can be freed. The row may be set again at once."""
        self.uses_R[row] = 0
        self.num_logprobs_R[row] = -1
        self.num_candidates_R[row] = 0
        self.extras[row] = _NO_EXTRAS

    def _extras(
        self,
        params: SamplingParams,
        eos_token_ids: Collection[int],
        bad_words_token_ids: Sequence[Sequence[int]],
    ) -> RowExtras:
        extras = RowExtras()
        if params.logit_bias:
            extras.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
            extras.bias = np.fromiter(params.logit_bias.values(), np.float32)
        if params.min_tokens:
            stop_ids = params.all_stop_token_ids(eos_token_ids)
            extras.stop_ids = np.array(sorted(stop_ids), np.int64)
            extras.min_tokens = params.min_tokens
        if params.allowed_token_ids is not None:
            extras.forbidden_V = torch.ones(self.vocab_size, dtype=torch.bool, device=self.device)
            extras.forbidden_V[torch.tensor(params.allowed_token_ids, device=self.device)] = False
        words = [word for word in bad_words_token_ids if len(word)]
        if words:
            longest = max(map(len, words)) - 1
            prefixes = [[-1] * (longest + 1 - len(word)) + list(word[:-1]) for word in words]
            extras.banned_words = BannedWords(
                prefix_BW=torch.tensor(prefixes, dtype=torch.int32, device=self.device).view(len(words), longest),
                prefix_len_B=torch.tensor([len(word) - 1 for word in words], device=self.device),
                last_B=torch.tensor([word[-1] for word in words], device=self.device),
            )
        return extras
