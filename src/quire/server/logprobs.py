"""Log probabilities in the two forms that OpenAI's endpoints give them. Knows tokens and text, not requests."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from quire.engine.tokenizer import Tokenizer
from quire.outputs import TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity: what cannot be drawn at all is told as this


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is part of a character by its bytes, so that different tokens keep different names."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs(found: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each prompt token, token id -> its log probability, rank and text."""
    if found is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(entry.logprob, LOWEST),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in found
    ]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """Of the tokens of one message, or of a piece of it."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, position in zip(token_ids, found):
        # the drawn token stands among them even where it is not one of the likeliest
        top = [(key, value) for key, value in position.items() if value.rank is not None and value.rank <= num_top]
        top.sort(key=lambda item: item[1].rank or 0)
        content.append(
            {
                **entry(token_id, position[token_id].logprob),
                "top_logprobs": [entry(key, value.logprob) for key, value in top[:num_top]],
            }
        )
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The older form, of one choice: parallel lists, with each token's place in the text.

    A stream takes them piece by piece, so this remembers how far the text has come.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def render(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """`found` has None for a prompt's first token, which nothing precedes."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, position in zip(token_ids, found):
            tokens.append(token_name(self._tokenizer, token_id))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            logprobs.append(None if position is None else max(position[token_id].logprob, LOWEST))
            tops.append(None if position is None else self._top(position))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, entry in position.items():  # a second token of the same text is the less likely one
            named.setdefault(token_name(self._tokenizer, token_id), max(entry.logprob, LOWEST))
        return named
