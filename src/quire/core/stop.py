"""When a sequence ends by its tokens. Stop *strings* are found where there is text: in the engine's output.

Of several accepted tokens (guesses that were right), those behind the end don't belong to the sequence.
"""

from __future__ import annotations

from quire.core.sequence import FinishReason, RequestGroup, Sequence

End = tuple[FinishReason, int | None]  # the reason, and the stop token if the request named it


def all_stop_ids(group: RequestGroup) -> list[int]:
    """End-of-text tokens, and those that the request named."""
    return [*group.stop_token_ids, *(group.params.stop_token_ids or ())]


def find_end(sequence: Sequence) -> End | None:
    """How the sequence's last token ends it, if it does. Before min_tokens no token stops."""
    group, num_output = sequence.group, sequence.num_output_tokens
    token = int(sequence.token_ids[-1])
    if num_output >= group.params.min_tokens:
        if token in group.stop_token_ids:
            return FinishReason.STOP, None
        if token in (group.params.stop_token_ids or ()):
            return FinishReason.STOP, token
    if num_output >= group.max_tokens:
        return FinishReason.LENGTH, None
    return None


def cut_behind_end(sequence: Sequence, tokens: list[int]) -> None:
    """Removes from `tokens`, which are about to be appended, those behind the one that ends the sequence."""
    group = sequence.group
    stops = set(all_stop_ids(group))
    for i, token in enumerate(tokens):
        num_output = sequence.num_output_tokens + i + 1
        if num_output >= group.max_tokens or (token in stops and num_output >= group.params.min_tokens):
            del tokens[i + 1 :]
            return
