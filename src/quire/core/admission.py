"""Can this group run? Now, later or never, and for want of what. Changes nothing.

Does not know the order of those who wait: the scheduler asks for one group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from quire.core.batch import Batch
from quire.core.block_pool import NULL_BLOCK
from quire.core.journal import Shortage
from quire.core.kv_cache import KVCacheManager, PrefixHit
from quire.core.preemption import blocks_ahead
from quire.core.sequence import RequestGroup, Sequence, Status
from quire.errors import RequestError


class Admission(Enum):
    NOW = "now"
    LATER = "later"
    NEVER = "never"


_PARAM_OF = {Shortage.LENGTH: "prompt", Shortage.ROWS: "n", Shortage.BLOCKS: "max_tokens"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`hit` is what a group that may start NOW finds in the prefix cache; None if it comes back from the host."""

    answer: Admission
    shortage: Shortage | None = None
    reason: str = ""
    hit: PrefixHit | None = None


class AdmissionControl:
    """`watermark`: the share of blocks that is left free for those that run when somebody is let in beside them."""

    def __init__(
        self, batch: Batch, kv: KVCacheManager, max_num_batched_tokens: int, max_model_len: int, watermark: float
    ) -> None:
        self._batch = batch
        self._kv = kv
        self._max_step_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._watermark_blocks = int(watermark * kv.pool.num_blocks)

    # -- ever ------------------------------------------------------------------------------------------------------------
    def check_ever(self, group: RequestGroup) -> None:
        """Raises RequestError, saying what it would take, if the group does not fit even when it is alone."""
        verdict = self.ever(group)
        if verdict.shortage is not None:
            raise RequestError(verdict.reason, param=_PARAM_OF[verdict.shortage])

    def ever(self, group: RequestGroup) -> Verdict:
        """NEVER, with the shortage and a sentence, or LATER."""
        prompt, n = len(group.prompt_token_ids), group.params.num_sequences
        if group.max_tokens < 1:
            reason = f"the prompt has {prompt} tokens; max_model_len={self._max_model_len} must leave room for one more"
            return Verdict(Admission.NEVER, Shortage.LENGTH, reason)
        if n > self._batch.max_num_seqs:
            reason = f"{_name_of_n(group)}={n} is more than max_num_seqs={self._batch.max_num_seqs}"
            return Verdict(Admission.NEVER, Shortage.ROWS, reason)
        needed = self._most_blocks(group)
        if needed > self._kv.pool.num_blocks:
            reason = (
                f"the request may need {needed} KV blocks (prompt {prompt} tokens, {_name_of_n(group)}={n}, "
                f"max_tokens={group.max_tokens}), the engine has {self._kv.pool.num_blocks}: lower "
                f"{_name_of_n(group)} or max_tokens"
            )
            return Verdict(Admission.NEVER, Shortage.BLOCKS, reason)
        return Verdict(Admission.LATER)

    def _most_blocks(self, group: RequestGroup) -> int:
        """Blocks that a group holds at most when alone: n sequences that share the prompt's full blocks."""
        size, n = self._kv.block_size, group.params.num_sequences
        prompt = len(group.prompt_token_ids)
        total = prompt + group.max_tokens - 1  # the last token's keys and values are not needed
        most = 0
        for spec in self._kv.groups:
            one = spec.max_blocks(total, size, self._max_step_tokens)
            shared = min(prompt // size, one) if spec.window is None else 0
            most += shared + n * (one - shared)
        return most

    # -- now -------------------------------------------------------------------------------------------------------------
    def now(self, group: RequestGroup, budget: int, num_free_rows: int, horizon: int = 0) -> Verdict:
        """NOW or LATER, for a group that no step or transfer in flight works on. `budget` is in tokens. With a horizon, it
        and those that run need room for so many more tokens each (see `ResumeGuard`)."""
        if group.num_rows > num_free_rows:
            return Verdict(Admission.LATER, Shortage.ROWS)
        kv, live = self._kv, group.live
        is_alone = not self._batch.num_running
        spare = kv.pool.num_free
        if not is_alone:
            spare -= self._watermark_blocks + self._promised_blocks(horizon)
            spare -= horizon * len(live) // kv.block_size * len(kv.groups)
        if live[0].status is Status.SWAPPED:
            needed = kv.num_to_swap_in(live)
            # and a block for each next token, unless it is alone and must come back even if that fills the pool
            fits = needed <= spare if is_alone else needed + len(live) <= spare
            return Verdict(Admission.NOW) if fits else Verdict(Admission.LATER, Shortage.BLOCKS)
        if budget <= 0:
            return Verdict(Admission.LATER, Shortage.BUDGET)
        hit = self._hit(group)
        if hit.partial and self._blocks_to_start(group, hit) > spare:
            hit = hit.without_partial()  # its source would be pinned beside its copy
        if self._blocks_to_start(group, hit) > spare:
            return Verdict(Admission.LATER, Shortage.BLOCKS)
        return Verdict(Admission.NOW, hit=hit)

    def _hit(self, group: RequestGroup) -> PrefixHit:
        """What the group finds: in the prefix cache, or in the running sequence that it was forked from."""
        lead, most = group.live[0], self._max_hit(group)
        hit = self._kv.lookup(lead, most)
        source = group.source
        # a limit of 0: its own blocks are still on their way
        if source is not None and source.status is Status.RUNNING and self._batch.limit[source.row] > 0:
            common = min(common_start(lead, source), source.num_computed, most)
            if 0 < common >= hit.num_tokens:  # as many at a block's end, where the source's are cached too
                return self._kv.shared_with(source, common) or hit
        return hit

    def _blocks_to_start(self, group: RequestGroup, hit: PrefixHit) -> int:
        """Blocks that stop being available when a group without any computes all tokens that it knows."""
        size, (lead, *others) = self._kv.block_size, group.live
        first_chunk = min(lead.num_tokens - hit.num_tokens, self._max_step_tokens)
        needed = self._kv.num_revived(hit)
        for spec, table in zip(self._kv.groups, hit.blocks):
            blocks = spec.max_blocks(lead.num_tokens, size, first_chunk)
            needed += max(blocks - sum(block != NULL_BLOCK for block in table), 0)
            needed += hit.is_fork and hit.num_tokens % size > 0  # whoever writes first copies the last block
        shared = len(group.prompt_token_ids) // size
        for sequence in others:
            for spec in self._kv.groups:
                blocks = spec.max_blocks(sequence.num_tokens, size, self._max_step_tokens)
                needed += blocks - shared if spec.window is None else blocks
        return needed

    def _promised_blocks(self, horizon: int = 0) -> int:
        """Blocks that running sequences still have to take for the tokens they know, and `horizon` more."""
        batch, size = self._batch, self._kv.block_size
        rows = batch.rows_in_order()
        known, most_tokens = batch.num_tokens[rows] + batch.num_pending[rows], batch.max_total[rows]
        promised = 0
        for spec, have, first in zip(self._kv.groups, self._kv.num_blocks, self._kv.first_block):
            missing = blocks_ahead(known, most_tokens, have[rows], horizon, size)
            if spec.window is not None:  # it lets go of blocks as it takes others
                most = spec.max_blocks(self._max_model_len, size, self._max_step_tokens)
                missing = np.minimum(missing, most - (have[rows] - first[rows]))
            promised += int(np.maximum(missing, 0).sum())
        return promised

    def _max_hit(self, group: RequestGroup) -> int:
        """The logits of the last known token are wanted, and of the whole prompt's when its logprobs are asked for.

        Where others are to fork from the first sequence, it has at least one token to compute before that point.
        """
        lead, *others = group.live
        if group.params.prompt_logprobs is not None and not lead.num_output_tokens:
            return 0
        return min([lead.num_tokens, *(common_start(sequence, lead) for sequence in others)]) - 1


def _name_of_n(group: RequestGroup) -> str:
    """What the caller calls the number of sequences."""
    if group.params.best_of is None:
        return "n"
    return "beam width" if group.params.use_beam_search else "best_of"


def common_start(sequence: Sequence, source: Sequence) -> int:
    """How many tokens of `sequence`, whose last is always to be computed, stand in `source` as well."""
    a, b = sequence.token_ids, source.token_ids
    size = min(len(a) - 1, len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
