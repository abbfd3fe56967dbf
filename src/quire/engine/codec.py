"""What passes between the API process and the engine's process: typed messages, as MessagePack, in frames.

    frame = length (4 bytes, little-endian) + one message

Every message is a struct whose fields and types are checked when it is read, so nothing that comes over the socket can be
more than data (no pickle). Parameters and outputs travel as the dataclasses that they are; those check their own values.
Does not know sockets or who sends what when.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage
from quire.outputs import CompletionOutput, RequestMetrics, TokenLogprobs
from quire.sampling_params import SamplingParams

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30  # more than any message can have; a length beyond it is a broken stream


# -- to the engine -----------------------------------------------------------------------------------------------------------
class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message: which engine to build."""

    config: EngineConfig


class Add(msgspec.Struct, tag=True, frozen=True):
    """A request. The prompt is either a text or token ids."""

    request_id: str
    prompt: str | list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    client: str = ""


class Fork(msgspec.Struct, tag=True, frozen=True):
    """Branches of a request that runs, by `Engine.fork`. Answered by `Forked`, before any of their outputs.

    `changes` are of the parent's parameters, by their names; an output kind by its value.
    """

    request_id: str
    branch_ids: Annotated[list[str], msgspec.Meta(min_length=1)]
    append: str | list[int] | None = None
    params: SamplingParams | None = None
    changes: dict[str, Any] = {}
    index: int = 0
    client: str | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for this request any more, or somebody wants it to end."""

    request_id: str


class AskUsage(msgspec.Struct, tag=True, frozen=True):
    """Where is every slot of KV memory? Answered by `Usage`."""


class AskExplain(msgspec.Struct, tag=True, frozen=True):
    """Why did a request of this client's (None: anybody's) take its time? Answered by `Explained`, with the same number.

    Without `with_others`, the answer does not tell what is in other prompts.
    """

    number: int
    request_id: str
    client: str | None = None
    with_others: bool = True


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End now; what still runs is lost."""


ToEngine = Start | Add | Fork | Abort | AskUsage | AskExplain | Stop


# -- from the engine ---------------------------------------------------------------------------------------------------------
class EngineInfo(msgspec.Struct, frozen=True):
    """What the API process must know of a loaded engine. `parts`: what starting it did, and the seconds of each."""

    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    max_logprobs: int
    tokenizer_dir: str | None
    recommended: dict[str, Any]  # sampling parameters, by generation_config.json
    parts: list[tuple[str, float]]


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot be built. `kind` is the name of one of quire.errors."""

    kind: str
    message: str


class EngineCounts(msgspec.Struct, array_like=True, frozen=True):
    """Cheap numbers that go with every report. Those without `num_` are running totals since the engine started."""

    num_running: int = 0  # requests
    num_waiting: int = 0  # requests
    num_sequences: int = 0  # that run
    num_blocks: int = 0
    num_free_blocks: int = 0  # with nothing in them
    num_cached_blocks: int = 0
    num_pending_blocks: int = 0
    added: int = 0  # requests taken from the socket, refused ones too
    steps: int = 0
    tokens: int = 0
    preemptions: list[tuple[str, str, str, int]] = []  # (what was done, cause, reason, how often)
    recomputed_tokens: int = 0
    swapped_in_blocks: int = 0
    swapped_out_blocks: int = 0
    copied_blocks: int = 0
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    forked: int = 0  # requests that are branches of others


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine can serve. The first message, or else `StartFailed` is."""

    info: EngineInfo
    counts: EngineCounts


class Output(msgspec.Struct, array_like=True, frozen=True):
    """What one request's caller is to hear of a step.

    What does not change comes once, with a request's first output: `prompt_token_ids` (of a prompt that was given as text),
    `prompt_logprobs` and `num_cached_tokens`. `metrics` come with the last.
    """

    request_id: str
    completions: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None


class Tokens(msgspec.Struct, array_like=True, frozen=True):
    """The outputs of a step that bring text and tokens of completion 0 and nothing else, which most do: in columns, where one
    costs a tenth of what an `Output` does on either side."""

    request_ids: list[str] = []
    texts: list[str] = []
    token_ids: list[list[int]] = []


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    """A request that was not taken: what is wrong, and with which field."""

    request_id: str
    message: str
    param: str | None


class Report(msgspec.Struct, tag=True, frozen=True):
    """The one message of a step: all that any request is told of it, either by an output or by a row of `tokens`."""

    counts: EngineCounts
    outputs: list[Output] = []
    refusals: list[Refusal] = []
    tokens: Tokens = Tokens()


class Usage(msgspec.Struct, tag=True, frozen=True):
    usage: SlotUsage


class Forked(msgspec.Struct, tag=True, frozen=True):
    """The branches of a `Fork`, whose first has this id, run; or else there is a refusal, and none of them does."""

    branch_id: str
    refusal: Refusal | None = None


class Explained(msgspec.Struct, tag=True, frozen=True):
    """`explanation` is plain data; None if there is no such request."""

    number: int
    explanation: dict[str, Any] | None


class Died(msgspec.Struct, tag=True, frozen=True):
    """The last message of an engine that a mistake has ended."""

    message: str


FromEngine = Ready | StartFailed | Report | Usage | Forked | Explained | Died


# -- frames ------------------------------------------------------------------------------------------------------------------
class CodecError(Exception):
    """What came is no message: the stream is broken, or the two sides are not of one version."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """A whole frame. Raises UnicodeEncodeError for a text that is not valid Unicode."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def body_length(header: bytes) -> int:
    """Raises CodecError for a length that no message has."""
    length = int.from_bytes(header, "little")
    if length > MAX_FRAME_BYTES:
        raise CodecError(f"a message of {length} bytes")
    return length


class MessageDecoder:
    """Reads bodies of frames as one side's messages. Raises CodecError for anything else."""

    def __init__(self, messages: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages)

    def decode(self, body: bytes | bytearray | memoryview) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise CodecError(str(error)) from error


def engine_side() -> MessageDecoder:
    """What the engine's process reads."""
    return MessageDecoder(ToEngine)


def api_side() -> MessageDecoder:
    """What the API process reads."""
    return MessageDecoder(FromEngine)
