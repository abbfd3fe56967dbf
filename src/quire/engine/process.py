"""The engine in a process of its own: `python -m quire.engine.process FD`, started by `EngineClient` with one end of a socket.

Messages in, a step, one report out. With nothing to do it sleeps in the kernel until a message comes; when the other end of
the socket closes, it ends. Does not know HTTP, nor asyncio.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from quire.core.step import Direction
from quire.engine.codec import (
    HEADER_BYTES,
    Abort,
    Add,
    AskExplain,
    AskUsage,
    Died,
    EngineCounts,
    EngineInfo,
    Explained,
    Fork,
    Forked,
    FromEngine,
    Output,
    Ready,
    Refusal,
    Report,
    Start,
    StartFailed,
    ToEngine,
    Tokens,
    Usage,
    body_length,
    encode,
    engine_side,
)
from quire.engine.engine import Engine
from quire.engine.explain import Explanation, without_others
from quire.errors import QuireError, RequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import RequestOutputKind, recommended_sampling

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
# A step that nobody is to hear of is told all the same, so often: whoever watches over the engine watches its steps.
HEARTBEAT_S = 0.25


class Channel:
    """The engine's end of the socket: whole messages, with or without waiting for one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._decoder = engine_side()
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Waits while the other side does not read. Raises OSError when it is gone."""
        self._socket.sendall(encode(message))

    def receive(self, *, wait: bool) -> list[ToEngine] | None:
        """What has come; with `wait`, at least one message. None when the other side is gone."""
        messages = self._take()
        while (wait and not messages) or self._poll.poll(0):
            try:
                data = self._socket.recv(READ_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
            messages += self._take()
        return messages

    def _take(self) -> list[ToEngine]:
        messages, at, buffer = [], 0, self._buffer
        while len(buffer) - at >= HEADER_BYTES:
            start = at + HEADER_BYTES
            end = start + body_length(bytes(buffer[at:start]))
            if len(buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(buffer[start:end])))
            at = end
        del buffer[:at]
        return messages


class EngineProcess:
    """Drives one engine by the messages of one channel."""

    def __init__(self, channel: Channel, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._engine = engine
        self._clock = clock
        self._untold: dict[
            str, bool
        ] = {}  # requests that run -> their prompt's ids are to be told with the first output
        self._open: set[str] = set()
        self._refusals: list[Refusal] = []
        self._num_added = 0
        self._num_forked = 0
        self._told_s = float("-inf")

    def run(self) -> None:
        """Returns when it is told to stop, or the other side is gone."""
        while self._take_messages():
            outputs = self._engine.step() if self._engine.has_unfinished else []
            now_s = self._clock()
            is_idle = not self._engine.has_unfinished  # then the counts must be right, for nothing follows
            if outputs or self._refusals or is_idle or now_s - self._told_s >= HEARTBEAT_S:
                self._told_s = now_s
                self._tell(outputs)

    def _take_messages(self) -> bool:
        messages = self._channel.receive(wait=not self._engine.has_unfinished)
        for message in messages or ():
            match message:
                case Add():
                    self._add(message)
                case Fork():
                    self._channel.send(self._fork(message))
                case Abort():
                    self._engine.abort(message.request_id)
                case AskUsage():
                    self._channel.send(Usage(self._engine.slot_usage()))
                case AskExplain():
                    self._channel.send(Explained(message.number, self._explain(message)))
                case _:
                    return False
        return messages is not None

    def _add(self, message: Add) -> None:
        self._num_added += 1
        key = "prompt" if isinstance(message.prompt, str) else "prompt_token_ids"
        prompt = {key: message.prompt, "cache_salt": message.cache_salt}
        try:
            self._engine.add_request(
                message.request_id, prompt, message.params, priority=message.priority, client=message.client
            )
        except RequestError as error:
            self._refusals.append(Refusal(message.request_id, str(error), error.param))
        else:
            self._open.add(message.request_id)
            self._untold[message.request_id] = isinstance(message.prompt, str)

    def _fork(self, message: Fork) -> Forked:
        self._num_added += len(message.branch_ids)
        changes = dict(message.changes)
        try:
            if "output_kind" in changes:
                changes["output_kind"] = RequestOutputKind(changes["output_kind"])
            self._engine.fork(
                message.request_id,
                message.branch_ids,
                append=message.append,
                params=message.params or changes,
                index=message.index,
                client=message.client,
            )
        except RequestError as error:
            return Forked(message.branch_ids[0], Refusal(message.request_id, str(error), error.param))
        self._num_forked += len(message.branch_ids)
        self._open.update(message.branch_ids)
        self._untold.update(dict.fromkeys(message.branch_ids, True))
        return Forked(message.branch_ids[0])

    def _explain(self, message: AskExplain) -> Explanation | None:
        found = self._engine.explain(message.request_id)
        if found is None or message.client not in (None, found["client"]):
            return None
        return found if message.with_others else without_others(found)

    # -- reports ---------------------------------------------------------------------------------------------------------
    def _tell(self, outputs: list[RequestOutput]) -> None:
        told: list[Output] = []
        tokens = Tokens([], [], [])
        for output in outputs:
            if not output.finished and output.request_id not in self._untold and _is_plain(output.outputs):
                (completion,) = output.outputs
                tokens.request_ids.append(output.request_id)
                tokens.texts.append(completion.text)
                tokens.token_ids.append(completion.token_ids)  # type: ignore[arg-type]
            else:
                told.append(self._as_told(output))
        self._open.difference_update(output.request_id for output in outputs if output.finished)
        refusals, self._refusals = self._refusals, []
        self._channel.send(Report(self.count(), told, refusals, tokens))

    def _as_told(self, output: RequestOutput) -> Output:
        with_ids = self._untold.pop(output.request_id, None)
        is_first = with_ids is not None
        return Output(
            request_id=output.request_id,
            completions=output.outputs,
            finished=output.finished,
            num_cached_tokens=output.num_cached_tokens if is_first else None,
            prompt_token_ids=list(output.prompt_token_ids or ()) if with_ids else None,
            prompt_logprobs=output.prompt_logprobs if is_first else None,
            metrics=output.metrics if output.finished else None,
        )

    def count(self) -> EngineCounts:
        scheduler, kv = self._engine.scheduler, self._engine.kv
        counts, pool = scheduler.counts, kv.pool
        num_waiting = scheduler.num_waiting
        return EngineCounts(
            num_running=max(len(self._open) - num_waiting, 0),
            num_waiting=num_waiting,
            num_sequences=scheduler.num_running,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free - pool.num_cached,
            num_cached_blocks=pool.num_cached,
            num_pending_blocks=pool.num_pending,
            added=self._num_added,
            steps=counts.steps,
            tokens=counts.tokens,
            preemptions=[
                (way.value, cause.value, reason.value, count)
                for (way, cause, reason), count in counts.preemptions.items()
            ],
            recomputed_tokens=counts.recomputed_tokens,
            swapped_in_blocks=counts.swapped_blocks[Direction.IN],
            swapped_out_blocks=counts.swapped_blocks[Direction.OUT],
            copied_blocks=kv.num_copies,
            prefix_queries=kv.num_prefix_queries,
            prefix_hits=kv.num_prefix_hits,
            forked=self._num_forked,
        )


def _is_plain(completions: list[CompletionOutput]) -> bool:
    """One completion, the first, with nothing but text and tokens."""
    if len(completions) != 1:
        return False
    found = completions[0]
    return (
        found.index == 0
        and found.cumulative_logprob is None
        and found.logprobs is None
        and found.finish_reason is None
        and found.beam_score is None
    )


def describe(engine: Engine, parts: list[tuple[str, float]]) -> EngineInfo:
    return EngineInfo(
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.config.max_num_seqs,
        vocab_size=engine.model.vocab_size,
        max_logprobs=engine.config.max_logprobs,
        tokenizer_dir=None if engine.tokenizer is None else str(engine.tokenizer_dir),
        recommended=recommended_sampling(engine.model.generation),
        parts=parts,
    )


def serve(channel: Channel, clock: Callable[[], float] = time.monotonic) -> int:
    """The life of an engine's process: build what the first message says, tell, run. Returns its exit code."""
    messages = channel.receive(wait=True)
    if not messages or not isinstance(messages[0], Start):
        return 2
    if len(messages) > 1:  # nothing but a Stop is sent before it is ready
        return 0
    began_s = clock()
    try:
        engine = Engine(messages[0].config, clock)
    except QuireError as error:
        channel.send(StartFailed(type(error).__name__, str(error)))
        return 2
    try:
        parts = [("torch, weights and KV memory", clock() - began_s)]
        process = EngineProcess(channel, engine, clock)
        gc.collect()
        gc.freeze()  # a model and its libraries stay: no collection between two steps is to walk through them
        channel.send(Ready(describe(engine, parts), process.count()))
        process.run()
    except OSError:
        return 0  # the other side is gone in the middle of a report
    except Exception as error:
        logger.exception("the engine died")
        channel.send(Died(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        engine.shutdown()
    return 0


def main() -> int:
    # Terminals and service managers signal whole groups of processes. When to end, the API process decides: it stops what
    # runs in order, and if it is killed, the socket closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("quire").setLevel(logging.INFO)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return serve(Channel(connection))


if __name__ == "__main__":
    sys.exit(main())
