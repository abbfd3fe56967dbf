"""`AsyncEngine`: the engine in a thread of its own, requests as asynchronous streams.

The thread owns the engine; everybody else leaves calls in its inbox. With nothing to do it sleeps. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage
from quire.engine.branch import Branch
from quire.engine.engine import Engine
from quire.engine.explain import Explanation
from quire.engine.input import Prompt
from quire.errors import EngineDeadError
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stream:
    """Where one request's outputs go: a queue of the event loop that waits for them."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[RequestOutput | Exception]

    def put(self, item: RequestOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class AsyncEngine:
    """Serves many requests at once from asyncio code.

        engine = AsyncEngine("path/to/model")
        async for output in engine.generate("Once upon", SamplingParams(max_tokens=20)):
            print(output.outputs[0].text)
        engine.shutdown()

    Options and errors as `LLM`. Leaving the loop early, or cancelling its task, aborts the request.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._start(EngineConfig.from_options(model, **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        engine = cls.__new__(cls)
        engine._start(config)
        return engine

    def _start(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count()
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        client: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs as its `output_kind` says, the last with finished=True.

        Leaving the loop early, or cancelling its task, aborts the request. Raises RequestError if the request is wrong,
        EngineDeadError if the engine stops.
        """
        request_id = request_id or f"request-{next(self._ids)}"
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())

        def add() -> None:
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority, client=client)
            self._streams[request_id] = stream

        await self._begin(add, {request_id: stream})
        async with aclosing(self._outputs(request_id, stream)) as outputs:
            async for output in outputs:
                yield output

    async def _outputs(self, request_id: str, stream: _Stream) -> AsyncGenerator[RequestOutput, None]:
        """The items of a stream, up to the request's end; whoever stops before that ends the request."""
        is_over = False
        try:
            while not is_over:
                item = await stream.items.get()
                is_over = isinstance(item, Exception) or item.finished
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not is_over:
                self._call(lambda: self._forget({request_id: stream}))

    async def fork(
        self,
        request_id: str,
        n: int = 1,
        *,
        append_tokens: str | Sequence[int] | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        index: int = 0,
        branch_ids: Sequence[str] | None = None,
        client: str | None = None,
    ) -> list[Branch]:
        """`n` branches of a request that runs: each goes on from its last accepted token, after `append_tokens` if those are
        given (a text or ids), shares its blocks, and is a request of its own, which streams and can be aborted or forked.

        Parameters and errors as `Engine.fork`. A branch whose outputs nobody reads runs nevertheless: abort it.
        """
        ids = list(branch_ids) if branch_ids is not None else [f"{request_id}-{next(self._ids)}" for _ in range(n)]
        loop = asyncio.get_running_loop()
        streams = {branch_id: _Stream(loop, asyncio.Queue()) for branch_id in ids}

        def fork() -> None:
            self.engine.fork(request_id, ids, append=append_tokens, params=sampling_params, index=index, client=client)
            self._streams.update(streams)

        await self._begin(fork, streams)
        return [Branch(branch_id, self, self._outputs(branch_id, stream)) for branch_id, stream in streams.items()]

    async def explain(self, request_id: str) -> Explanation | None:
        """Why a request took its time (see `Engine.explain`)."""
        return await asyncio.wrap_future(self._call(lambda: self.engine.explain(request_id)))

    async def slot_usage(self) -> SlotUsage:
        """Where every slot of KV memory is, now."""
        return await asyncio.wrap_future(self._call(self.engine.slot_usage))

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its stream gets a last output that says "abort". False if it isn't there."""
        return await asyncio.wrap_future(self._call(lambda: self.engine.abort(request_id)))

    @property
    def is_alive(self) -> bool:
        return self._error is None and not self._is_closed

    def shutdown(self) -> None:
        """Ends all requests with EngineDeadError and frees everything. May be called twice."""
        self._inbox.put(None)
        self._thread.join()

    # -- calls into the thread -----------------------------------------------------------------------------------------
    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function in the engine's thread, between two steps."""
        future: Future[Any] = Future()
        with self._gate:
            if self.is_alive:
                self._inbox.put((function, future))
            else:
                future.set_exception(self._dead())
        return future

    async def _begin(self, begin: Callable[[], None], streams: Mapping[str, _Stream]) -> None:
        """Waits until the engine's thread has begun the requests of `streams`; whoever stops waiting ends them."""
        try:
            await asyncio.wrap_future(self._call(begin))
        except BaseException:
            self._call(lambda: self._forget(streams))
            raise

    def _forget(self, streams: Mapping[str, _Stream]) -> None:
        """Nobody reads these any more. An id may be a later request's by now."""
        for request_id, stream in streams.items():
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
                self.engine.abort(request_id, tell=False)

    # -- the thread ------------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._answer_inbox():
                for output in self.engine.step():
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
                        if output.finished:
                            del self._streams[output.request_id]
        except BaseException as error:
            logger.exception("the engine died")
            self._error = error
        with self._gate:  # from here on nobody puts anything into the inbox
            self._is_closed = True
        for stream in self._streams.values():
            stream.put(self._dead())
        self._streams.clear()
        while not self._inbox.empty():
            if (call := self._inbox.get()) is not None and call[1].set_running_or_notify_cancel():
                call[1].set_exception(self._dead())
        self.engine.shutdown()

    def _answer_inbox(self) -> bool:
        """Makes the calls that are in the inbox, waiting for one if there is nothing else to do. False at the end."""
        while True:
            try:
                call = self._inbox.get(block=not self.engine.has_unfinished)
            except queue.Empty:
                return True
            if call is None:
                return False
            function, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(
            f"the engine has stopped: {self._error!r}" if self._error else "the engine was shut down"
        )
