"""Who answers in a chat: an engine in this process, or a server somewhere. Both stream text for a list of messages.

An answer is a generator of pieces of text that fills a `TurnStats` on the way. Closing it early, or Ctrl-C, aborts the
request and frees its blocks. A model without a chat template is given the bare texts to go on with; `has_template` tells. Does
not know terminals, commands, or what a conversation is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from quire.bench.timeline import read_metrics
from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.input import Prompt
from quire.engine.interrupt import held_interrupt
from quire.errors import ConfigError, EngineDeadError, QuireError, RequestError
from quire.sampling_params import RequestOutputKind, SamplingParams, over_recommended, recommended_sampling

Message = Mapping[str, str]

CONTINUATION_TOKENS = 256  # of an answer without a chat template, which has no end of its own


@dataclass
class TurnStats:
    """What one answer took. num_prompt, num_cached: None where nobody tells. first_s, total_s: from the question."""

    num_prompt: int | None = None
    num_cached: int | None = None
    num_output: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token; None for answers of one token."""
        if self.first_s is None or self.num_output < 2 or self.total_s <= self.first_s:
            return None
        return (self.num_output - 1) / (self.total_s - self.first_s)


class ChatModel(Protocol):
    """Who answers. `sampling` has the names and values of SamplingParams' fields."""

    name: str
    has_template: bool

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any], stats: TurnStats
    ) -> Generator[str, None, None]:
        """Raises QuireError if there is no answer, KeyboardInterrupt at Ctrl-C, when the request has been aborted."""

    def describe_memory(self) -> str:
        """What is in the KV cache now, in one line."""

    def close(self) -> None: ...


def as_continuation(messages: Sequence[Message]) -> str:
    """The texts alone, each of the user's on a new line; an answer goes on right behind what it answers."""
    parts: list[str] = []
    for message in messages:
        if parts and message["role"] == "user":
            parts.append("\n")
        parts.append(message["content"])
    return "".join(parts)


# -- here --------------------------------------------------------------------------------------------------------------------
class LocalModel:
    """An engine in this process, stepped while an answer is being read. Raises what `Engine` raises."""

    def __init__(self, config: EngineConfig) -> None:
        if config.skip_tokenizer_init:
            raise ConfigError("a chat is text: it needs the tokenizer that skip_tokenizer_init leaves out")
        self.name = config.model_name
        self._engine = Engine(config)
        assert self._engine.tokenizer is not None
        self._tokenizer = self._engine.tokenizer
        self.has_template = "default" in self._tokenizer.chat_templates
        limit = None if self.has_template else CONTINUATION_TOKENS
        self._defaults = {"max_tokens": limit, "output_kind": RequestOutputKind.DELTA}
        self._recommended = recommended_sampling(self._engine.model.generation)
        self._num_requests = 0

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any], stats: TurnStats
    ) -> Generator[str, None, None]:
        params = SamplingParams(**{**self._defaults, **over_recommended(self._recommended, sampling)})
        self._num_requests += 1
        request_id, engine, began_s = f"chat-{self._num_requests}", self._engine, time.perf_counter()
        engine.add_request(request_id, self._prompt(messages), params)
        try:
            with held_interrupt(patient=True) as interrupt:
                while engine.has_unfinished:
                    interrupt.check()
                    for output in engine.step():
                        (completion,) = output.outputs or (None,)
                        stats.num_prompt = len(output.prompt_token_ids or ())
                        stats.num_cached = output.num_cached_tokens
                        stats.total_s = time.perf_counter() - began_s
                        if completion is None:
                            continue
                        stats.num_output += len(completion.token_ids)
                        stats.first_s = stats.first_s or stats.total_s
                        stats.finish_reason = completion.finish_reason
                        if completion.finish_reason == "error":
                            raise EngineDeadError(f"the request failed: {completion.stop_reason}")
                        yield completion.text
        finally:
            engine.abort(request_id)
            while engine.has_unfinished:
                engine.step()

    def _prompt(self, messages: Sequence[Message]) -> Prompt:
        if self.has_template:
            return {"prompt_token_ids": self._tokenizer.encode_chat(messages)}
        return as_continuation(messages)

    def describe_memory(self) -> str:
        usage = self._engine.slot_usage()
        used = usage.total - usage.free
        return (
            f"KV cache: {used:,} of {usage.total:,} slots in use ({used / usage.total:.1%}): {usage.allocated:,} held, "
            f"{usage.cached:,} kept for later prompts"
        )

    def close(self) -> None:
        self._engine.shutdown()


# -- elsewhere ---------------------------------------------------------------------------------------------------------------
class RemoteModel:
    """A server that speaks OpenAI's API, Quire's or another's. Raises ConfigError if none answers at `url`."""

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.has_template = True  # until the server says otherwise
        try:
            # no limit to reading: a long prompt on a busy server takes its time, and Ctrl-C is there
            self._http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10.0, read=None))
            self.name = model or self._first_model()
        except (httpx.HTTPError, httpx.InvalidURL, RequestError) as error:
            raise ConfigError(f"cannot chat with {base}: {error}") from error

    def _first_model(self) -> str:
        response = self._http.get("/v1/models", timeout=10.0)
        try:
            if response.status_code != 200:
                raise _error_of(response)
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestError("it lists no models") from error

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any], stats: TurnStats
    ) -> Generator[str, None, None]:
        began_s = time.perf_counter()
        try:
            try:
                yield from self._stream(messages, sampling, stats, began_s)
            except RequestError as error:
                if not self.has_template or "chat template" not in str(error) or stats.num_output:
                    raise
                self.has_template = False
                yield from self._stream(messages, sampling, stats, began_s)
        except httpx.HTTPError as error:
            raise EngineDeadError(f"the connection to the server failed: {error or type(error).__name__}") from error

    def _stream(
        self, messages: Sequence[Message], sampling: Mapping[str, Any], stats: TurnStats, began_s: float
    ) -> Iterator[str]:
        body: dict[str, Any] = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        body |= {name: value for name, value in sampling.items() if value is not None}
        if self.has_template:
            path = "/v1/chat/completions"
            body["messages"] = list(messages)
        else:
            path = "/v1/completions"
            body = {"max_tokens": CONTINUATION_TOKENS, **body, "prompt": as_continuation(messages)}
        with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                    continue
                event = _parse(data)
                stats.total_s = time.perf_counter() - began_s
                yield from _read_choices(event, stats)
                if usage := event.get("usage"):
                    stats.num_prompt = usage.get("prompt_tokens")
                    stats.num_output = usage.get("completion_tokens", stats.num_output)
                    stats.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def describe_memory(self) -> str:
        try:
            response = self._http.get("/metrics", timeout=10.0)
            gauges, slots = read_metrics(response.text)
        except httpx.HTTPError:
            return "KV cache: the server does not tell"
        if slots and (total := sum(slots.values())):
            used = total - slots.get("free", 0.0)
            return f"KV cache: {used:,.0f} of {total:,.0f} slots in use ({used / total:.1%}), by all of the server's clients"
        if (share := gauges.get("kv_cache_usage_perc")) is not None:
            return f"KV cache: {share:.1%} in use, by all of the server's clients"
        return "KV cache: the server does not tell"

    def close(self) -> None:
        self._http.close()


def _read_choices(event: Mapping[str, Any], stats: TurnStats) -> Iterator[str]:
    for choice in event.get("choices") or ():
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        stats.finish_reason = choice.get("finish_reason") or stats.finish_reason
        if text:
            stats.num_output += 1  # a guess, until the usage comes
            stats.first_s = stats.first_s or stats.total_s
            yield text


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise EngineDeadError("the server's stream is not JSON") from error
    if event.get("error"):
        raise EngineDeadError(f"the server broke off: {event['error'].get('message')}")
    return dict(event)


def _error_of(response: httpx.Response) -> QuireError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return RequestError(f"HTTP {response.status_code}: {message}")
