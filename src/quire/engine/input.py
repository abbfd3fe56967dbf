"""What a caller may pass as a prompt, checked and tokenized into a `RequestGroup`.

Does not know whether there is room for it: the scheduler does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from quire.config import EngineConfig
from quire.core.beam import Beam
from quire.core.sequence import RequestGroup
from quire.core.sequence import Sequence as TokenSequence
from quire.engine.detokenizer import text_stream
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.sampling_params import SamplingParams

# A text, token ids, or vLLM's dictionaries: {"prompt": text}, {"prompt_token_ids": ids}, with "cache_salt" if wanted.
Prompt = str | Sequence[int] | Mapping[str, Any]

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
PRIORITY_LIMIT = 1 << 31
TOKENIZED_AT_ONCE = 1024  # texts


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. A list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def tokenized(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Iterator[Prompt]:
    """The same prompts, texts with their token ids beside them. Of many texts all cores make these, a thousand texts at a time.

    What is wrong with a prompt is left for `InputProcessor` to tell.
    """
    for first in range(0, len(prompts), TOKENIZED_AT_ONCE):
        some = list(prompts[first : first + TOKENIZED_AT_ONCE])
        texts = {i: text for i, prompt in enumerate(some) if (text := _bare_text(prompt)) is not None}
        if len(texts) > 1:
            with suppress(RequestError):
                for i, token_ids in zip(texts, tokenizer.encode_batch(list(texts.values()))):
                    prompt = some[i]
                    own = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
                    some[i] = {**own, "prompt_token_ids": token_ids}
        yield from some


def _bare_text(prompt: Prompt) -> str | None:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt") if prompt.get("prompt_token_ids") is None else None  # type: ignore[assignment]
    return prompt if isinstance(prompt, str) else None


def numbered_seed(base: int, number: int) -> int:
    """A seed for the `number`-th request of a job that was given one seed: 63 bits that look like no other's."""
    return int.from_bytes(hashlib.sha256(f"{base}:{number}".encode()).digest()[:8], "little") >> 1


class InputProcessor:
    """Turns prompts into groups for one model."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, max_model_len: int, tokenizer: Tokenizer | None
    ) -> None:
        self._config = config
        self._model = model
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._num_seeds = 0

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int,
        arrival_s: float,
        client: str = "",
        source: TokenSequence | None = None,
    ) -> tuple[RequestGroup, str | None]:
        """The group, and the prompt's text if that was given. Raises RequestError for anything that is wrong with either."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
        if not isinstance(priority, int) or abs(priority) >= PRIORITY_LIMIT:
            raise RequestError(f"priority must be an integer within ±2**31, not {priority!r}", param="priority")
        params.verify(
            vocab_size=self._model.vocab_size,
            max_model_len=self._max_model_len,
            max_logprobs=self._config.max_logprobs,
        )
        text, token_ids, salt = self._read(prompt)
        if params.truncate_prompt_tokens is not None:
            as_many_as_fit = params.truncate_prompt_tokens == -1
            keep = self._max_model_len - 1 if as_many_as_fit else params.truncate_prompt_tokens
            token_ids = token_ids[-keep:]
        if len(token_ids) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; max_model_len={self._max_model_len} must leave room for "
                f"at least one more: shorten the prompt, or set truncate_prompt_tokens",
                param="prompt",
            )
        if (params.stop_strings or params.bad_words) and self._tokenizer is None:
            name = "stop" if params.stop_strings else "bad_words"
            raise RequestError(f"{name} needs a tokenizer, and skip_tokenizer_init left it out", param=name)
        if params.stop_strings and not params.detokenize:
            raise RequestError("stop strings are found in the text: detokenize=False leaves none", param="stop")
        if params.num_sequences > params.n and not params.use_beam_search and params.logprobs is None:
            params = replace(params, logprobs=0)  # the best are chosen by it
        bad_words = self._tokenizer.encode_bad_words(params.bad_words) if params.bad_words and self._tokenizer else []
        group = RequestGroup(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=self._next_seed() if params.seed is None else params.seed,
            arrival_s=arrival_s,
            priority=priority,
            client=client,
            source=source,
            find_stop_string=self._stop_finder(params, token_ids)
            if params.use_beam_search and params.stop_strings
            else None,
            stop_token_ids=() if params.ignore_eos else self._end_tokens(),
            bad_words_token_ids=tuple(map(tuple, bad_words)),
            cache_salt=salt,
        )
        return group, text

    def _stop_finder(self, params: SamplingParams, prompt: np.ndarray) -> Callable[[Beam, int], str | None]:
        """Finds the stop string that a token completes, in the text that the caller will get; of several the one that ends
        first, the longest if they end together."""
        tokenizer, stops = self._tokenizer, params.stop_strings
        assert tokenizer is not None
        # nearly every token adds a character; those that add none are few in a row
        reach = max(map(len, stops)) + 16
        last_of_prompt = prompt[-16:].tolist()

        def find(beam: Beam, token: int) -> str | None:
            token_ids = beam.token_ids(last=reach)
            stream = text_stream(tokenizer, last_of_prompt, params.skip_special_tokens)
            before = "".join(map(stream.push, token_ids))
            text = before + stream.push(token)
            if len(text) == len(before):  # half a character
                return None
            starts = {stop: text.find(stop, max(len(before) - len(stop) + 1, 0)) for stop in stops}
            found = [(start + len(stop), start, stop) for stop, start in starts.items() if start >= 0]
            return min(found)[2] if found else None

        return find

    def read_appended(self, append: str | Sequence[int] | None) -> list[int]:
        """Tokens of what a branch goes on with: a text, or token ids."""
        if append is None or len(append) == 0:
            return []
        if isinstance(append, str):
            if self._tokenizer is None:
                raise RequestError("a text to append needs a tokenizer: pass token ids", param="append")
            return self._tokenizer.encode_appended(append)
        return self._check_ids(append).tolist()

    def _read(self, prompt: Prompt) -> tuple[str | None, np.ndarray, str | None]:
        salt = None
        if isinstance(prompt, Mapping):
            unknown = [key for key in prompt if key not in _PROMPT_KEYS and prompt[key] is not None]
            if unknown:
                raise RequestError(
                    f"unknown prompt key {unknown[0]!r}; known are {', '.join(_PROMPT_KEYS)}", param="prompt"
                )
            salt = prompt.get("cache_salt")
            if salt is not None and (not isinstance(salt, str) or not salt):
                raise RequestError("cache_salt must be a string that isn't empty", param="cache_salt")
            ids = prompt.get("prompt_token_ids")
            text = prompt.get("prompt")
            if ids is None and text is None:
                raise RequestError('a prompt dictionary needs "prompt" or "prompt_token_ids"', param="prompt")
            if ids is not None:
                return text, self._check_ids(ids), salt
            prompt = text  # type: ignore[assignment]
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "a text prompt needs a tokenizer, and skip_tokenizer_init left it out: pass prompt_token_ids",
                    param="prompt",
                )
            return prompt, self._check_ids(self._tokenizer.encode(prompt)), salt
        return None, self._check_ids(prompt), salt

    def _check_ids(self, ids: object) -> np.ndarray:
        """int32 array of ids, all within the model's vocabulary."""
        if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
            raise RequestError(f"a prompt is a text or a list of token ids, not {type(ids).__name__}", param="prompt")
        try:
            array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        except ValueError:
            array = np.asarray([None])
        if array.size == 0:
            raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise RequestError("prompt_token_ids must be a flat list of integers", param="prompt")
        wrong = np.flatnonzero((array < 0) | (array >= self._model.vocab_size))
        if len(wrong):
            raise RequestError(
                f"prompt token id {array[wrong[0]]} at index {wrong[0]} is outside the vocabulary "
                f"of {self._model.vocab_size} tokens",
                param="prompt",
            )
        return array.astype(np.int32)

    def _end_tokens(self) -> tuple[int, ...]:
        ids = list(self._model.eos_token_ids)
        own = self._tokenizer.eos_token_id if self._tokenizer else None
        if own is not None and own not in ids:
            ids.append(own)
        return tuple(ids)

    def _next_seed(self) -> int:
        """A seed for a request that names none: by the engine's seed and a count, so that a script's run can be repeated."""
        self._num_seeds += 1
        return numbered_seed(self._config.seed, self._num_seeds - 1)
