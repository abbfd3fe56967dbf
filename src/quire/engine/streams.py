"""Where the outputs of requests come in, on the side that asked for them: each request has a `Stream`, which fills a `Mailbox`.

    request id (the caller's)  "same"     "same"           may come again as soon as nobody reads the stream of the last one
    key (the engine's)         "same#0"   "same#1"         never comes again

What the engine still says of a request that was given up has a key of which nothing is known any more, and is passed over.
Does not know the engine, nor how messages come and go.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.engine.codec import Output
from quire.errors import RequestError
from quire.outputs import CompletionOutput, RequestMetrics, RequestOutput

NUM_PAST = 1024  # requests that are over of which the key is kept; the engine can explain fewer


class Mailbox:
    """Where the outputs of some requests come in, in their order, and how these requests fail. One task reads it.

    It is woken once for all that came at a time: a reader who falls behind finds more, and needs less time for each.
    """

    def __init__(self) -> None:
        self._items: list[RequestOutput | Exception] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        self._items.append(item)
        if self._reader is not None:
            if not self._reader.done():  # it may have been cancelled
                self._reader.set_result(None)
            self._reader = None

    async def take(self) -> list[RequestOutput | Exception]:
        """All that is there; waits for something."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        items, self._items = self._items, []
        return items


@dataclass(slots=True)
class Stream:
    """One request's outputs on their way to a mailbox, and what came with the first of them."""

    request_id: str
    key: str
    mailbox: Mailbox
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: Any = None
    num_cached_tokens: int | None = None

    def take(self, output: Output) -> None:
        if output.prompt_token_ids:
            self.prompt_token_ids = output.prompt_token_ids
        if output.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        self.tell(output.completions, output.finished, output.metrics)

    def tell(
        self, completions: list[CompletionOutput], finished: bool = False, metrics: RequestMetrics | None = None
    ) -> None:
        self.mailbox.put(
            RequestOutput(  # by position: one for each token
                self.request_id,
                self.prompt,
                self.prompt_token_ids,
                self.prompt_logprobs,
                completions,
                finished,
                metrics,
                self.num_cached_tokens,
            )
        )


class Streams:
    """Those that are open, by the ids of either side."""

    def __init__(self) -> None:
        self.by_id: dict[str, Stream] = {}
        self.by_key: dict[str, Stream] = {}
        self._past: OrderedDict[str, str] = OrderedDict()  # request id -> key, of the last that were closed
        self._numbers = itertools.count()

    def new(self, request_id: str, mailbox: Mailbox) -> Stream:
        """One that is not open yet. Raises RequestError if another one of this id is."""
        if request_id in self.by_id:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        return Stream(request_id, f"{request_id}#{next(self._numbers)}", mailbox)

    def open(self, streams: Sequence[Stream]) -> None:
        self.by_id.update((stream.request_id, stream) for stream in streams)
        self.by_key.update((stream.key, stream) for stream in streams)

    def close(self, stream: Stream) -> None:
        del self.by_id[stream.request_id], self.by_key[stream.key]
        self._past[stream.request_id] = stream.key
        self._past.move_to_end(stream.request_id)
        if len(self._past) > NUM_PAST:
            self._past.popitem(last=False)

    def last_key(self, request_id: str) -> str | None:
        """Of the last request with this id, open or not; None if it is not known any more."""
        stream = self.by_id.get(request_id)
        return self._past.get(request_id) if stream is None else stream.key
