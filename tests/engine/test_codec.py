"""The messages between the API process and the engine's: they come back as they were, and nothing else comes back."""

import pickle
from pathlib import Path

import msgspec
import pytest

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage
from quire.engine.codec import (
    HEADER_BYTES,
    Abort,
    Add,
    AskExplain,
    AskUsage,
    CodecError,
    Died,
    EngineCounts,
    Explained,
    Fork,
    Forked,
    Output,
    Refusal,
    Report,
    Start,
    StartFailed,
    Stop,
    Tokens,
    Usage,
    api_side,
    body_length,
    encode,
    engine_side,
)
from quire.errors import ConfigError, RequestError
from quire.outputs import CompletionOutput, Logprob, RequestMetrics
from quire.sampling_params import RequestOutputKind, SamplingParams

PARAMS = SamplingParams(
    n=3,
    temperature=0.5,
    seed=(1 << 64) - 1,
    stop=["END", "ende"],
    stop_token_ids=[1, 2],
    logit_bias={5: -100.0, 1 << 30: 1.0},
    bad_words=["é"],
    logprobs=2,
    output_kind=RequestOutputKind.DELTA,
)
COMPLETION = CompletionOutput(
    index=2,
    text="half 🙂",
    token_ids=[7, 8],
    cumulative_logprob=-1.5,
    logprobs=[{7: Logprob(-0.5, 1, "half"), 9: Logprob(float("-inf"), 3, None)}],
    finish_reason="stop",
    stop_reason="END",
)


@pytest.mark.parametrize(
    "message",
    [
        Start(EngineConfig(model="m", hf_overrides={"a": [1, {"b": None}]}, dtype="bf16")),
        Add("id", "a prompt", PARAMS, priority=-3, cache_salt="salt"),
        Add("id", [1, 2, 3], SamplingParams()),
        Add("id", "a prompt", PARAMS, client="alice"),
        Fork("id", ["a", "b"], "text", PARAMS, index=3, client="alice"),
        Fork("id", ["a"], [1, 2], changes={"seed": 5, "stop": ["x"], "logit_bias": {"7": -1.5}, "output_kind": 1}),
        Abort("id"),
        AskUsage(),
        AskExplain(1 << 40, "id", "alice", with_others=False),
        Stop(),
    ],
)
def test_what_goes_to_the_engine_arrives_as_it_was(message: object) -> None:
    assert engine_side().decode(encode(message)[HEADER_BYTES:]) == message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        StartFailed("ModelError", "no config.json"),
        Report(EngineCounts(num_running=3, prefix_hits=1 << 40)),
        Report(EngineCounts(preemptions=[("swap", "out of blocks", "swap cheaper", 3)], forked=2)),
        Forked("a"),
        Forked("a", Refusal("id", "no request", "request_id")),
        Explained(7, None),
        Explained(7, {"summary": ["a"], "prefix": {"blocks": [1, 2]}, "times": {"arrival_time": 1.5}}),
        Report(
            EngineCounts(),
            [Output("id", [COMPLETION], True, 16, [1, 2], [None, {3: Logprob(-1.0, 1, "x")}], RequestMetrics(1.5))],
            [Refusal("other", "too long", "prompt")],
        ),
        Report(EngineCounts(), tokens=Tokens(["a", "b"], [" half 🙂", ""], [[7], [8, 1 << 30]])),
        Usage(SlotUsage(1, 2, 3, 4, 5, 6, 21, 0)),
        Died("StopIteration"),
    ],
)
def test_what_comes_from_the_engine_arrives_as_it_was(message: object) -> None:
    assert api_side().decode(encode(message)[HEADER_BYTES:]) == message  # type: ignore[arg-type]


def test_a_frame_says_how_long_it_is() -> None:
    frame = encode(Abort("x" * 1000))
    assert body_length(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    with pytest.raises(CodecError, match="bytes"):
        body_length(b"\xff\xff\xff\xff")


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/quire-was-unpickled"),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        pickle.dumps(Trap()),
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Abort"}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": 5}),
        msgspec.msgpack.encode({"type": "Add", "request_id": "a", "prompt": [1.5], "params": {}}),
        msgspec.msgpack.encode({"type": "Fork", "request_id": "a", "branch_ids": []}),
        msgspec.msgpack.encode({"type": "Fork", "request_id": "a", "branch_ids": ["b"], "append": [0.5]}),
        encode(Report(EngineCounts()))[HEADER_BYTES:],  # the other side's message
    ],
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(CodecError):
        engine_side().decode(body)
    assert not Path("/tmp/quire-was-unpickled").exists()


def test_values_are_checked_on_arrival() -> None:
    """A struct of the right types with values out of range is no message either: the dataclasses check themselves."""
    with pytest.raises((CodecError, RequestError)):
        engine_side().decode(
            msgspec.msgpack.encode({"type": "Add", "request_id": "a", "prompt": "x", "params": {"n": 0}})
        )
    with pytest.raises((CodecError, ConfigError)):
        engine_side().decode(msgspec.msgpack.encode({"type": "Start", "config": {"model": "m", "block_size": 0}}))


def test_no_module_on_either_side_unpickles() -> None:
    import quire

    package = Path(quire.__path__[0])
    sources = [*package.glob("engine/*.py"), *package.glob("server/*.py")]
    assert len(sources) > 15
    for source in sources:
        words = source.read_text()
        assert "import pickle" not in words and "import multiprocessing" not in words and "marshal" not in words
