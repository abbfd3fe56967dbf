"""`EngineClient`: the engine in a process of its own, with the streams of `AsyncEngine`. For one event loop.

It starts the process, passes requests and their outputs, starts it again when it has died, and sees from its reports whether
it is stuck. Does not know HTTP, nor what is in a prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import operator
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage
from quire.engine.branch import Branch
from quire.engine.codec import (
    HEADER_BYTES,
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
    Output,
    Ready,
    Refusal,
    Report,
    Start,
    StartFailed,
    Stop,
    ToEngine,
    Usage,
    api_side,
    body_length,
    encode,
)
from quire.engine.explain import Explanation
from quire.engine.input import Prompt
from quire.errors import CapacityError, ConfigError, EngineDeadError, ModelError, QuireError, RequestError, WeightsError
from quire.outputs import CompletionOutput, RequestMetrics, RequestOutput
from quire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

START_ERRORS: Mapping[str, type[QuireError]] = {
    kind.__name__: kind for kind in (ConfigError, ModelError, WeightsError, CapacityError)
}
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0  # before a dead engine is started again; doubled each time
STEADY_S = 60.0  # an engine that has lived so long starts with the first pause again
END_S = 5.0  # for a process to end by itself before it is killed
USAGE_AGE_S, USAGE_WAIT_S = 1.0, 1.0
# Of reports that this side has not read yet, before the engine waits for it: many steps', for they must not wait while this
# process is busy with a burst of new requests. (The system may allow less.)
SOCKET_BYTES = 1 << 20


class Health(Enum):
    """What can be said of the engine; only OK is good."""

    OK = "ok"
    STARTING = "starting"
    STUCK = "stuck"  # it has work, and no step has come back for a long time
    DEAD = "dead"  # and about to be started again
    STOPPED = "stopped"


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
            _answer(self._reader, None)
            self._reader = None

    async def take(self) -> list[RequestOutput | Exception]:
        """All that is there; waits for something."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        items, self._items = self._items, []
        return items


@dataclass(slots=True)
class _Stream:
    """One request's outputs on their way to a mailbox, and what came with the first of them."""

    request_id: str
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
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count()
        self._added = 0  # requests sent to the present process
        self._progress_s = 0.0  # of the last step, or of the request that ended its idleness
        self._forks: dict[str, asyncio.Future[Refusal | None]] = {}  # not answered yet, by their first branch
        self._questions: dict[int, asyncio.Future[Explanation | None]] = {}
        self._usage: SlotUsage | None = None
        self._usage_s = float("-inf")
        self._usage_waiter: asyncio.Future[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._decoder = api_side()

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
        self._send(Stop())
        await self._end_process(END_S)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        with theirs:
            # -P: what lies in the working directory is not ours to import
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "quire.engine.process", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=SOCKET_BYTES)
        self._send(Start(self.config))
        match await self._receive():
            case Ready(info=info, counts=counts):
                self._info, self.counts = info, counts
            case StartFailed(kind=kind, message=message):
                raise START_ERRORS.get(kind, QuireError)(message)
            case _:
                raise EngineDeadError("the engine's process ended while it was starting: its messages are above")
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
            status = await self._end_process(0.5)
            self.fail_all(f"the engine has died ({reason or _exit_text(status)}); it is being started again")
            logger.error("the engine has died: %s", reason or _exit_text(status))
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
                    await self._end_process(0.5)

    async def _end_process(self, patience_s: float) -> int | None:
        """Waits for the process to end, kills it if it does not; its exit status."""
        process, writer = self._process, self._writer
        if process is None:
            return None
        try:
            await asyncio.wait_for(process.wait(), patience_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if writer is not None:
            writer.close()
        self._process = self._writer = None
        return process.returncode

    # -- messages --------------------------------------------------------------------------------------------------------
    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _receive(self) -> Any:
        """The next message, None when there are no more."""
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return self._decoder.decode(await self._reader.readexactly(body_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def _listen(self) -> str | None:
        """Takes messages until there are no more; why that is, if the engine has said it."""
        while True:
            try:
                message = await self._receive()
            except CodecError as error:
                return f"what it says cannot be read: {error}"
            match message:
                case Report():
                    self._take_report(message)
                case Usage(usage=usage):
                    self._usage, self._usage_s = usage, self._clock()
                    if self._usage_waiter is not None and not self._usage_waiter.done():
                        self._usage_waiter.set_result(None)
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
        for request_id, text, token_ids in zip(told.request_ids, told.texts, told.token_ids):
            if (stream := self._streams.get(request_id)) is not None:
                stream.tell([CompletionOutput(0, text, token_ids)])
        for output in report.outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.take(output)
                if output.finished:
                    del self._streams[output.request_id]
        for refusal in report.refusals:
            if (stream := self._streams.pop(refusal.request_id, None)) is not None:
                stream.mailbox.put(RequestError(refusal.message, param=refusal.param))

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
        async for output in self._outputs(request_id, mailbox):
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
        stream = _Stream(request_id, mailbox)
        if isinstance(content, str):
            stream.prompt = content
        else:
            stream.prompt_token_ids = content
        self._send_new(Add(request_id, content, params, priority, salt, client), [stream])

    def _send_new(self, message: Add | Fork, streams: Sequence[_Stream]) -> None:
        """Sends what begins the requests of `streams`. Raises RequestError or EngineDeadError, with nothing sent."""
        if self._health is not Health.OK:
            raise EngineDeadError(f"the engine is {self._health.value}: try again later")
        for stream in streams:
            if stream.request_id in self._streams:
                raise RequestError(f"request id {stream.request_id!r} is in use", param="request_id")
        try:
            frame = encode(message)
        except (UnicodeEncodeError, OverflowError, TypeError) as error:
            param = "prompt" if isinstance(message, Add) else "append"
            raise RequestError(f"the request cannot be written down: {error}", param=param) from error
        if not self._streams:
            self._progress_s = self._clock()
        self._streams.update((stream.request_id, stream) for stream in streams)
        self._added += len(streams)
        assert self._writer is not None
        self._writer.write(frame)

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
        append = append_tokens if isinstance(append_tokens, str | None) else _token_ids(append_tokens, "append")
        params = sampling_params if isinstance(sampling_params, SamplingParams) else None
        changes = {} if params is not None else dict(sampling_params or {})  # type: ignore[arg-type]
        ids = list(branches)
        streams = [_Stream(branch_id, mailbox) for branch_id, mailbox in branches.items()]
        self._send_new(Fork(request_id, ids, append, params, changes, index, client), streams)
        answer = self._forks[ids[0]] = asyncio.get_running_loop().create_future()
        is_done = False
        try:
            refusal = await answer
            if refusal is not None:
                raise RequestError(refusal.message, param=refusal.param)
            is_done = True
        finally:
            self._forks.pop(ids[0], None)
            if not is_done:
                for branch_id, mailbox in branches.items():
                    self.drop(branch_id, mailbox)

    def drop(self, request_id: str, mailbox: Mailbox) -> None:
        """Nobody reads any more what comes of this request: it is to end, if it has not."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.mailbox is mailbox:  # and not a later one of the same id
            del self._streams[request_id]
            self._send(Abort(request_id))

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its stream gets a last output that says "abort". False if it isn't there."""
        if request_id not in self._streams:
            return False
        self._send(Abort(request_id))
        return True

    def fail_all(self, why: str) -> None:
        """Ends all streams with EngineDeadError, and their requests."""
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._send(Abort(request_id))
            stream.mailbox.put(EngineDeadError(why))
        waiting: list[asyncio.Future[Any]] = [*self._forks.values(), *self._questions.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(EngineDeadError(why))
        self._forks, self._questions = {}, {}
        if self._usage_waiter is not None and not self._usage_waiter.done():
            self._usage_waiter.set_result(None)

    # -- what goes on inside -----------------------------------------------------------------------------------------------
    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start comes first"
        return self._info

    @property
    def is_alive(self) -> bool:
        return self._health is Health.OK

    @property
    def _is_stopped(self) -> bool:
        return self._health is Health.STOPPED

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def health(self) -> Health:
        is_stalled = bool(self._streams) and self._clock() - self._progress_s > self._stall_timeout_s
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
                self._send(AskUsage())
            await asyncio.wait({self._usage_waiter}, timeout=USAGE_WAIT_S)
        return self._usage

    async def explain(
        self, request_id: str, client: str | None = None, *, with_others: bool = True
    ) -> Explanation | None:
        """Why a request took its time (see `Engine.explain`); None for one that is not here, or not this client's.

        Without `with_others` it does not tell what is in others' prompts. Raises EngineDeadError.
        """
        if self._health is not Health.OK:
            raise EngineDeadError(f"the engine is {self._health.value}: try again later")
        number = next(self._ids)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._send(AskExplain(number, request_id, client, with_others))
        try:
            return await answer
        finally:
            self._questions.pop(number, None)


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


def _exit_text(status: int | None) -> str:
    if status is None:
        return "its process is gone"
    return f"killed by signal {-status}" if status < 0 else f"its process ended with status {status}"
