"""`EngineClient`: the engine in a process of its own, with the streams of `AsyncEngine`. For one event loop.

    EngineClient ──> EngineChild (child.py) ══ socket ══ process.py ──> Engine
         └─────────> Streams (streams.py) ──> the mailboxes of those who asked

It passes requests and their outputs, starts the process again when it has died, and sees from its reports whether it is stuck.
Does not know HTTP, nor what is in a prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import operator
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from typing import Any

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage
from quire.engine.branch import Branch
from quire.engine.child import EngineChild
from quire.engine.codec import (
    Abort,
    Add,
    AskExplain,
    AskUsage,
    CodecError,
    Died,
    EngineCounts,
    EngineInfo,
    Explained,
    Fork,
    Forked,
    Refusal,
    Report,
    Stop,
    Usage,
    encode,
)
from quire.engine.explain import Explanation
from quire.engine.input import Prompt
from quire.engine.streams import Mailbox, Stream, Streams
from quire.errors import EngineDeadError, QuireError, RequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0  # before a dead engine is started again; doubled each time
STEADY_S = 60.0  # an engine that has lived so long starts with the first pause again
END_S, DYING_S = 5.0, 0.5  # for a process that was told to end, or has died, to be gone before it is killed
USAGE_AGE_S, USAGE_WAIT_S = 1.0, 1.0


class Health(Enum):
    """What can be said of the engine; only OK is good."""

    OK = "ok"
    STARTING = "starting"
    STUCK = "stuck"  # it has work, and no step has come back for a long time
    DEAD = "dead"  # and about to be started again
    STOPPED = "stopped"


class EngineClient:
    """Serves requests by an engine in another process.

        client = EngineClient(EngineConfig(model="path/to/model"))
        await client.start()
        async for output in client.generate("Once upon", SamplingParams(max_tokens=20)):
            print(output.outputs[0].text)
        await client.stop()

    stall_timeout_s: without a step for so long, an engine that has work counts as stuck.
    """

    def __init__(
        self, config: EngineConfig, *, stall_timeout_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.counts = EngineCounts()
        self.num_restarts = 0
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._info: EngineInfo | None = None
        self._health = Health.STARTING
        self._child = EngineChild()
        self._streams = Streams()
        self._ids = itertools.count()
        self._added = 0  # requests sent to the present process
        self._progress_s = 0.0  # of the last step, or of the request that ended its idleness
        self._forks: dict[str, asyncio.Future[Refusal | None]] = {}  # not answered yet, by their first branch's key
        self._questions: dict[int, asyncio.Future[Explanation | None]] = {}
        self._usage: SlotUsage | None = None
        self._usage_s = float("-inf")
        self._usage_waiter: asyncio.Future[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    # -- the life of the process -----------------------------------------------------------------------------------------
    async def start(self) -> EngineInfo:
        """Starts the process and waits until it can serve. Raises what `Engine` raises, EngineDeadError if it ends."""
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep(), name="quire-engine-keeper")
        return self.info

    async def stop(self) -> None:
        """Ends the process; requests that run end with EngineDeadError. May be called twice."""
        self._health = Health.STOPPED
        self.fail_all("the engine was shut down")
        if self._keeper is not None:  # first, for it may be starting the process again
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._child.send(Stop())
        await self._child.end(END_S)

    async def _launch(self) -> None:
        ready = await self._child.start(self.config)
        self._info, self.counts = ready.info, ready.counts
        self._added, self._progress_s, self._usage = 0, self._clock(), None
        self._health = Health.OK

    async def _keep(self) -> None:
        """Reads reports; when the process is gone, tells everybody, and starts it again."""
        pause_s = FIRST_PAUSE_S
        while not self._is_stopped:
            began_s = self._clock()
            reason = await self._listen()
            if self._is_stopped:
                return
            self._health = Health.DEAD
            ending = await self._child.end(DYING_S)
            self.fail_all(f"the engine has died ({reason or ending}); it is being started again")
            logger.error("the engine has died: %s", reason or ending)
            if self._clock() - began_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            while not self._is_stopped and self._health is Health.DEAD:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                try:
                    await self._launch()
                    self.num_restarts += 1
                    logger.warning("the engine was started again")
                except (QuireError, OSError, CodecError) as error:
                    logger.error("the engine cannot be started again: %s; next try in %.1f s", error, pause_s)
                    await self._child.end(DYING_S)

    # -- messages --------------------------------------------------------------------------------------------------------
    async def _listen(self) -> str | None:
        """Takes messages until there are no more; why that is, if the engine has said it."""
        while True:
            try:
                message = await self._child.receive()
            except CodecError as error:
                return f"what it says cannot be read: {error}"
            match message:
                case Report():
                    self._take_report(message)
                case Usage(usage=usage):
                    self._usage, self._usage_s = usage, self._clock()
                    _answer(self._usage_waiter, None)
                case Forked(branch_id=branch_id, refusal=refusal):
                    _answer(self._forks.pop(branch_id, None), refusal)
                case Explained(number=number, explanation=explanation):
                    _answer(self._questions.pop(number, None), explanation)
                case Died(message=text):
                    return text
                case _:
                    return None

    def _take_report(self, report: Report) -> None:
        self.counts = report.counts
        self._progress_s = self._clock()
        told = report.tokens
        by_key = self._streams.by_key
        for key, text, token_ids in zip(told.request_ids, told.texts, told.token_ids):
            if (stream := by_key.get(key)) is not None:
                stream.tell([CompletionOutput(0, text, token_ids)])
        for output in report.outputs:
            if (stream := by_key.get(output.request_id)) is not None:
                stream.take(output)
                if output.finished:
                    self._streams.close(stream)
        for refusal in report.refusals:
            if (stream := by_key.get(refusal.request_id)) is not None:
                stream.mailbox.put(RequestError(refusal.message, param=refusal.param))
                self._streams.close(stream)

    # -- requests --------------------------------------------------------------------------------------------------------
    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        client: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs as its `output_kind` says, the last with finished=True. `client`: whose it is.

        Leaving the loop early, or cancelling its task, aborts the request. Raises RequestError if the request is wrong,
        EngineDeadError if the engine is not there or stops.
        """
        request_id, mailbox = request_id or f"request-{next(self._ids)}", Mailbox()
        params = SamplingParams() if sampling_params is None else sampling_params
        self.submit(request_id, mailbox, prompt, params, priority=priority, client=client)
        async with aclosing(self._outputs(request_id, mailbox)) as outputs:
            async for output in outputs:
                yield output

    async def _outputs(self, request_id: str, mailbox: Mailbox) -> AsyncGenerator[RequestOutput, None]:
        """What comes of one request, up to its end; whoever stops before that ends the request."""
        try:
            while True:
                for item in await mailbox.take():
                    if isinstance(item, Exception):
                        raise item
                    yield item
                    if item.finished:
                        return
        finally:
            self.drop(request_id, mailbox)

    def submit(
        self,
        request_id: str,
        mailbox: Mailbox,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        client: str = "",
    ) -> None:
        """Begins a request whose outputs come into `mailbox`; the last has finished=True, or an exception ends it.

        Raises as `generate`. Who no longer reads tells it by `drop`.
        """
        given = (
            prompt
            if isinstance(prompt, Mapping)
            else {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        )
        content, salt = _content(given), given.get("cache_salt")
        # the engine's process would take anything of another type for a broken stream
        if not (isinstance(params, SamplingParams) and isinstance(priority, int) and isinstance(salt, str | None)):
            raise RequestError("parameters are SamplingParams, priority is an integer, cache_salt a string")
        self._need_engine()
        stream = self._streams.new(request_id, mailbox)
        if isinstance(content, str):
            stream.prompt = content
        else:
            stream.prompt_token_ids = content
        self._send_new(Add(stream.key, content, params, priority, salt, client), [stream])

    def _send_new(self, message: Add | Fork, streams: Sequence[Stream]) -> None:
        """Sends what begins the requests of `streams`. Raises RequestError, with nothing sent."""
        try:
            frame = encode(message)
        except (UnicodeEncodeError, OverflowError, TypeError) as error:
            param = "prompt" if isinstance(message, Add) else "append"
            raise RequestError(f"the request cannot be written down: {error}", param=param) from error
        if not self._streams.by_id:
            self._progress_s = self._clock()
        self._streams.open(streams)
        self._added += len(streams)
        self._child.send_frame(frame)

    def _need_engine(self) -> None:
        if self._health is not Health.OK:
            raise EngineDeadError(f"the engine is {self._health.value}: try again later")

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
        """Branches of a request that runs: parameters and errors as `AsyncEngine.fork`, and EngineDeadError.

        When it raises, or is cancelled, no branch runs.
        """
        ids = list(branch_ids) if branch_ids is not None else [f"{request_id}-{next(self._ids)}" for _ in range(n)]
        if not ids or len(set(ids)) < len(ids):
            raise RequestError(f"n must be at least 1, and ids differ: {ids}", param="n")
        boxes = {branch_id: Mailbox() for branch_id in ids}
        await self.submit_fork(
            request_id,
            boxes,
            append_tokens=append_tokens,
            sampling_params=sampling_params,
            index=index,
            client=client,
        )
        return [Branch(branch_id, self, self._outputs(branch_id, mailbox)) for branch_id, mailbox in boxes.items()]

    async def submit_fork(
        self,
        request_id: str,
        branches: Mapping[str, Mailbox],
        *,
        append_tokens: str | Sequence[int] | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        index: int = 0,
        client: str | None = None,
    ) -> None:
        """The same, with an id for each branch and the mailbox that its outputs come into, as `submit` has it."""
        self._need_engine()
        append = append_tokens if isinstance(append_tokens, str | None) else _token_ids(append_tokens, "append")
        params = sampling_params if isinstance(sampling_params, SamplingParams) else None
        changes = {} if params is not None else dict(sampling_params or {})  # type: ignore[arg-type]
        parent = self._streams.by_id.get(request_id)
        if parent is None:
            raise RequestError(f"no request {request_id!r} is running", param="request_id")
        streams = [self._streams.new(branch_id, mailbox) for branch_id, mailbox in branches.items()]
        keys = [stream.key for stream in streams]
        self._send_new(Fork(parent.key, keys, append, params, changes, index, client), streams)
        answer = self._forks[keys[0]] = asyncio.get_running_loop().create_future()
        is_done = False
        try:
            refusal = await answer
            if refusal is not None:
                raise RequestError(refusal.message.replace(parent.key, request_id), param=refusal.param)
            is_done = True
        finally:
            self._forks.pop(keys[0], None)
            if not is_done:
                for branch_id, mailbox in branches.items():
                    self.drop(branch_id, mailbox)

    def drop(self, request_id: str, mailbox: Mailbox) -> None:
        """Nobody reads any more what comes of this request: it is to end, if it has not."""
        stream = self._streams.by_id.get(request_id)
        if stream is not None and stream.mailbox is mailbox:  # and not a later one of the same id
            self._streams.close(stream)
            self._child.send(Abort(stream.key))

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its stream gets a last output that says "abort". False if it isn't there."""
        stream = self._streams.by_id.get(request_id)
        if stream is None:
            return False
        self._child.send(Abort(stream.key))
        return True

    def fail_all(self, why: str) -> None:
        """Ends all streams with EngineDeadError, and their requests."""
        for stream in list(self._streams.by_id.values()):
            self._streams.close(stream)
            self._child.send(Abort(stream.key))
            stream.mailbox.put(EngineDeadError(why))
        waiting: list[asyncio.Future[Any]] = [*self._forks.values(), *self._questions.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(EngineDeadError(why))
        self._forks, self._questions = {}, {}
        _answer(self._usage_waiter, None)

    # -- what goes on inside -----------------------------------------------------------------------------------------------
    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start comes first"
        return self._info

    @property
    def _is_stopped(self) -> bool:
        return self._health is Health.STOPPED

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None while there is none."""
        return self._child.pid

    @property
    def health(self) -> Health:
        is_stalled = bool(self._streams.by_id) and self._clock() - self._progress_s > self._stall_timeout_s
        return Health.STUCK if self._health is Health.OK and is_stalled else self._health

    def num_queued(self, more: int = 0) -> int:
        """Requests that would wait if `more` came: those of which the engine has told, and those on their way to it, less
        what it can start at once."""
        counts = self.counts
        on_their_way = self._added - counts.added + more
        seats = self.info.max_num_seqs - counts.num_sequences if not counts.num_waiting else 0
        return max(counts.num_waiting + on_their_way - max(seats, 0), 0)

    async def slot_usage(self) -> SlotUsage | None:
        """Where every slot is, at most a second old; older, or None, if the engine does not answer in time."""
        if self._clock() - self._usage_s > USAGE_AGE_S and self._health is Health.OK:
            if self._usage_waiter is None or self._usage_waiter.done():
                self._usage_waiter = asyncio.get_running_loop().create_future()
                self._child.send(AskUsage())
            await asyncio.wait({self._usage_waiter}, timeout=USAGE_WAIT_S)
        return self._usage

    async def explain(
        self, request_id: str, client: str | None = None, *, with_others: bool = True
    ) -> Explanation | None:
        """Why a request took its time (see `Engine.explain`); None for one that is not here, or not this client's.

        Without `with_others` it does not tell what is in others' prompts. Raises EngineDeadError.
        """
        self._need_engine()
        key = self._streams.last_key(request_id)
        if key is None:
            return None
        number = next(self._ids)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._child.send(AskExplain(number, key, client, with_others))
        try:
            found = await answer
        finally:
            self._questions.pop(number, None)
        return None if found is None else _renamed(found, key, request_id)


def _answer(future: asyncio.Future[Any] | None, value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _content(given: Mapping[str, Any]) -> str | list[int]:
    """The text or the token ids of a prompt dictionary."""
    unknown = set(given) - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown:
        raise RequestError(f"unknown prompt key {min(unknown)!r}", param="prompt")
    ids, text = given.get("prompt_token_ids"), given.get("prompt")
    if ids is None and isinstance(text, str):
        return text
    return _token_ids(ids or (), "prompt")


def _token_ids(ids: Any, param: str) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in ids]
    except TypeError as error:
        raise RequestError(f"{param}: it is a text or a list of token ids", param=param) from error


def _renamed(found: Explanation, key: str, request_id: str) -> Explanation:
    """The engine's explanation with the id that the caller knows."""
    summary = [sentence.replace(key, request_id) for sentence in found["summary"]]
    return {**found, "request_id": request_id, "summary": summary}
