"""`AsyncEngine`: streams, aborts, and what callers hear when the engine dies. No test waits for a clock."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncEngine, SamplingParams
from quire.config import EngineConfig
from quire.errors import EngineDeadError, RequestError
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind
from support import assert_nothing_leaked

OPTIONS: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 8}


@pytest.fixture
def engine(tiny_model: Path) -> Any:
    made = AsyncEngine(str(tiny_model), **OPTIONS)
    yield made
    made.shutdown()


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def idle(engine: AsyncEngine) -> None:
    """Until the engine's thread has nothing to do."""
    while await asyncio.wrap_future(engine._call(lambda: engine.engine.has_unfinished)):
        await asyncio.sleep(0.001)


def test_a_stream_grows_by_tokens_and_ends(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    outputs = asyncio.run(collect(engine.generate([5] * 9, params)))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == list(range(1, 8))
    assert [output.finished for output in outputs] == [False] * 6 + [True]
    metrics = outputs[-1].metrics
    assert metrics is not None
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times)


def test_made_from_a_config_it_answers_as_made_from_options(engine: AsyncEngine, tiny_model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    other = AsyncEngine.from_config(EngineConfig.from_options(str(tiny_model), **OPTIONS))
    try:
        found, expected = (asyncio.run(collect(each.generate([5] * 9, params)))[-1] for each in (other, engine))
    finally:
        other.shutdown()
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_increments_add_up_to_the_whole(engine: AsyncEngine) -> None:
    def params(kind: RequestOutputKind) -> SamplingParams:
        return SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True, output_kind=kind)

    async def both() -> tuple[list[RequestOutput], list[RequestOutput]]:
        streams = [
            engine.generate([6] * 20, params(kind)) for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
        ]
        deltas, whole = await asyncio.gather(*map(collect, streams))
        return deltas, whole

    deltas, whole = asyncio.run(both())
    assert len(whole) == 1
    for completion in whole[0].outputs:
        pieces = [part for output in deltas for part in output.outputs if part.index == completion.index]
        assert [token for part in pieces for token in part.token_ids] == list(completion.token_ids)
        assert [part.finish_reason for part in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_many_requests_at_once_answer_as_alone(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[3 + i] * (1 + i) for i in range(24)]

    async def last(prompt: list[int]) -> list[int]:
        return list((await collect(engine.generate(prompt, params)))[-1].outputs[0].token_ids)

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*map(last, prompts))

    together = asyncio.run(all_at_once())
    alone = [asyncio.run(last(prompt)) for prompt in prompts]
    assert together == alone
    assert_nothing_leaked(engine.engine)


def test_leaving_a_stream_aborts_its_request(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def leave() -> None:
        stream = engine.generate([5] * 9, params, "left")
        async for _ in stream:
            break
        await stream.aclose()
        await idle(engine)

    asyncio.run(leave())
    assert engine.engine.scheduler.counts.steps < 150
    assert_nothing_leaked(engine.engine)


def test_cancelling_a_task_aborts_its_request(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def cancel() -> None:
        first = asyncio.Event()

        async def listen() -> None:
            async for _ in engine.generate([5] * 9, params):
                first.set()

        task = asyncio.create_task(listen())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)

    asyncio.run(cancel())
    assert_nothing_leaked(engine.engine)


def test_abort_ends_a_stream_with_what_there_is(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)

    async def abort() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate([5] * 9, params, "mine"):
            outputs.append(output)
            if len(outputs) == 3:
                assert await engine.abort("mine")
        assert not await engine.abort("mine")
        return outputs

    outputs = asyncio.run(abort())
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert_nothing_leaked(engine.engine)


def test_a_wrong_request_raises_and_the_engine_goes_on(engine: AsyncEngine) -> None:
    async def try_it() -> None:
        with pytest.raises(RequestError, match="vocabulary"):
            await collect(engine.generate([1000], SamplingParams()))
        good = collect(engine.generate([5], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True), "same"))
        task = asyncio.create_task(good)
        await asyncio.sleep(0)
        while not await asyncio.wrap_future(engine._call(lambda: engine.engine.has_unfinished)):
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in use"):
            await collect(engine.generate([5], SamplingParams(), "same"))
        assert (await task)[-1].finished

    asyncio.run(try_it())


def test_a_dying_engine_tells_everybody(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = engine.engine.executor.worker  # type: ignore[attr-defined]
    steps = iter(range(3))

    def broken(step: object) -> None:
        next(steps)
        forward(step)

    forward = worker.forward
    monkeypatch.setattr(worker, "forward", broken)

    async def listen() -> None:
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        with pytest.raises(EngineDeadError, match="StopIteration"):
            await collect(engine.generate([5], params))
        assert not engine.is_alive
        with pytest.raises(EngineDeadError):
            await collect(engine.generate([5], params))

    asyncio.run(listen())


def test_shutdown_ends_streams_and_may_be_called_twice(engine: AsyncEngine) -> None:
    async def listen() -> None:
        stream = engine.generate([5], SamplingParams(temperature=0, max_tokens=240, ignore_eos=True))
        await anext(stream)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(stream)

    asyncio.run(listen())
    engine.shutdown()


def test_an_id_may_come_again_as_soon_as_its_stream_is_closed(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    few = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    async def again() -> list[RequestOutput]:
        last: list[RequestOutput] = []
        for _ in range(20):
            stream = engine.generate([5] * 9, params, "same")
            await anext(stream)
            await stream.aclose()
            last = await collect(engine.generate([6] * 4, few, "same"))
            assert last[-1].outputs[0].finish_reason == "length"
            assert last[-1].prompt_token_ids == [6] * 4
        return last

    assert len(asyncio.run(again())[-1].outputs[0].token_ids) == 3
    assert_nothing_leaked(engine.engine)


def test_leaving_an_old_stream_leaves_a_later_request_of_its_id_alone(engine: AsyncEngine) -> None:
    short, longer = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 200))

    async def both() -> list[RequestOutput]:
        old = engine.generate([5] * 9, short, "same")
        await anext(old)
        await idle(engine)  # it has ended; who reads it does not know yet
        new = engine.generate([6] * 4, longer, "same")
        await anext(new)
        await old.aclose()
        return await asyncio.wait_for(collect(new), 60)

    outputs = asyncio.run(both())
    assert outputs[-1].finished and len(outputs[-1].outputs[0].token_ids) == 200
    assert_nothing_leaked(engine.engine)


def test_the_end_of_an_aborted_request_is_not_told_to_a_later_one_of_its_id(engine: AsyncEngine) -> None:
    long, few = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (400, 3))

    async def again() -> list[RequestOutput]:
        stream = engine.generate([5] * 9, long, "same")
        await anext(stream)
        held = threading.Event()
        engine._call(held.wait)  # so that all that follows comes between two steps
        aborted = asyncio.create_task(engine.abort("same"))
        await asyncio.sleep(0)
        closed = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0)
        added = asyncio.create_task(collect(engine.generate([6] * 4, few, "same")))
        await asyncio.sleep(0.01)
        held.set()
        await asyncio.gather(aborted, closed)
        return await asyncio.wait_for(added, 60)

    (*_, last) = asyncio.run(again())
    assert (last.prompt_token_ids, last.outputs[0].finish_reason) == ([6] * 4, "length")
    assert_nothing_leaked(engine.engine)


def test_who_is_cancelled_while_a_request_begins_leaves_none(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    async def cancelled() -> None:
        held = threading.Event()
        engine._call(held.wait)
        task = asyncio.create_task(anext(engine.generate([5] * 9, params, "same")))
        await asyncio.sleep(0.01)
        # the engine's thread begins it, while the loop has not heard of that
        held.set()
        while not engine._streams:
            time.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await asyncio.wrap_future(engine._call(lambda: list(engine._streams)))
        await idle(engine)

    asyncio.run(cancelled())
    assert_nothing_leaked(engine.engine)
