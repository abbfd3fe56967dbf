"""`EngineClient`: the engine in another process, with the streams of `AsyncEngine`."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.engine.client import EngineClient, Health
from quire.engine.codec import Report
from quire.engine.streams import Mailbox
from quire.errors import EngineDeadError, ModelError, RequestError
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

GREEDY = {"temperature": 0, "ignore_eos": True}


def with_client(model: Path, work: Callable[[EngineClient], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        config = EngineConfig(
            model=str(model), load_format="dummy", skip_tokenizer_init=True, num_threads=1, max_num_seqs=8
        )
        client = EngineClient(config, **options)
        await client.start()
        try:
            await work(client)
        finally:
            await client.stop()
        assert client.pid is None and client.health is Health.STOPPED

    asyncio.run(asyncio.wait_for(main(), 60))


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def test_streams_of_each_kind(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        def params(kind: RequestOutputKind) -> SamplingParams:
            return SamplingParams(**GREEDY, n=2, max_tokens=6, prompt_logprobs=1, logprobs=0, output_kind=kind)

        cumulative, delta, final = await asyncio.gather(
            *(collect(client.generate([5] * 9, params(kind))) for kind in RequestOutputKind)
        )
        assert len(cumulative) == len(delta) == 6 and len(final) == 1
        for outputs in (cumulative, delta, final):
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            for output in outputs:
                assert output.prompt_token_ids == [5] * 9
                assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 9
            assert outputs[-1].metrics is not None and outputs[-1].metrics.time_in_queue is not None
        for i in range(2):
            tokens = list(final[0].outputs[i].token_ids)
            assert list(cumulative[-1].outputs[i].token_ids) == tokens and len(tokens) == 6
            assert [token for output in delta for token in output.outputs[i].token_ids] == tokens
        assert client.counts.num_running == 0 and client.counts.steps >= 6
        usage = await client.slot_usage()
        assert usage is not None and usage.free + usage.cached == usage.total

    with_client(tiny_model, work)


def test_what_brings_only_tokens_comes_in_columns_and_reads_the_same(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        reports: list[Report] = []
        take = client._take_report

        def note(report: Report) -> None:
            reports.append(report)
            take(report)

        client._take_report = note  # type: ignore[method-assign]
        params = {**GREEDY, "max_tokens": 12, "output_kind": RequestOutputKind.DELTA}
        await collect(client.generate([5] * 40, SamplingParams(**params)))
        reports.clear()
        plain = await collect(client.generate([5] * 40, SamplingParams(**params), "plain"))
        assert sum(len(report.tokens.request_ids) for report in reports) == 10
        assert sum(len(report.outputs) for report in reports) == 2  # the first and the last say more
        reports.clear()
        full = await collect(client.generate([5] * 40, SamplingParams(**params, logprobs=0), "full"))
        assert sum(len(report.outputs) for report in reports) == 12
        assert not any(report.tokens.request_ids for report in reports)
        both = await collect(client.generate([5] * 40, SamplingParams(**params, n=2)))
        for outputs in (plain, full, both):
            assert [list(output.outputs[0].token_ids) for output in outputs] == [
                list(output.outputs[0].token_ids) for output in plain
            ]
            for output in outputs:
                assert output.prompt_token_ids == [5] * 40 and (output.num_cached_tokens or 0) >= 16
        assert {len(output.outputs) for output in both} == {2}

    with_client(tiny_model, work)


def test_a_reader_is_woken_once_for_all_that_came(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        mailbox, params = Mailbox(), SamplingParams(**GREEDY, max_tokens=5, output_kind=RequestOutputKind.DELTA)
        for name in ("a", "b"):
            client.submit(name, mailbox, [5], params)
        with pytest.raises(RequestError, match="in use"):
            client.submit("a", Mailbox(), [5], params)
        while client._streams.by_id:
            await asyncio.sleep(0.01)
        items = await mailbox.take()  # nobody has read until now
        outputs = [item for item in items if isinstance(item, RequestOutput)]
        assert len(outputs) == len(items) == 10
        assert [output.finished for output in outputs if output.request_id == "a"] == [False] * 4 + [True]
        client.submit("c", mailbox, [1000], params)
        (error,) = await mailbox.take()
        assert isinstance(error, RequestError) and error.param == "prompt"
        client.submit("d", mailbox, [5], SamplingParams(**GREEDY, max_tokens=240))
        client.drop("d", Mailbox())  # another's
        assert len(await mailbox.take()) >= 1
        client.drop("d", mailbox)
        await until_empty(client)

    with_client(tiny_model, work)


def test_wrong_requests_fail_alone(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        good = asyncio.create_task(collect(client.generate([5], SamplingParams(**GREEDY, max_tokens=200))))
        for prompt, param in (
            ([1000], "prompt"),
            ([], "prompt"),
            ([1 << 70], "prompt"),
            ("text", "prompt"),
            ([5] * 500, "prompt"),
        ):
            with pytest.raises(RequestError) as caught:
                await collect(client.generate(prompt, SamplingParams()))
            assert caught.value.param == param
        for prompt in ({"nope": 1}, {"prompt": 5}, [1.5], {"prompt": "x", "cache_salt": 5}):
            with pytest.raises(RequestError):
                await collect(client.generate(prompt, SamplingParams()))  # type: ignore[arg-type]
        with pytest.raises(RequestError) as caught:
            await collect(client.generate([5], SamplingParams(n=100)))
        assert caught.value.param == "n"
        assert (await good)[-1].finished and client.health is Health.OK

    with_client(tiny_model, work)


def test_leaving_and_aborting(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=240)
        async with contextlib.aclosing(client.generate([5], params, "left")) as stream:
            await anext(stream)
        async with contextlib.aclosing(client.generate([6], params, "same")) as stream:
            await anext(stream)
            with pytest.raises(RequestError, match="in use"):
                await collect(client.generate([6], params, "same"))
        outputs = []
        async for output in client.generate([7], params, "ended"):
            outputs.append(output)
            if len(outputs) == 1:
                assert await client.abort("ended")
        assert outputs[-1].outputs[0].finish_reason == "abort" and len(outputs) < 200
        assert not await client.abort("ended")
        await collect(client.generate([8], SamplingParams(**GREEDY, max_tokens=1)))
        counts = client.counts
        assert counts.num_running == counts.num_waiting == counts.num_sequences == 0
        assert counts.num_free_blocks + counts.num_cached_blocks == counts.num_blocks

    with_client(tiny_model, work)


def test_an_id_is_free_at_once_when_its_request_is_dropped(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        long = SamplingParams(**GREEDY, max_tokens=240)
        short = SamplingParams(**GREEDY, max_tokens=5, output_kind=RequestOutputKind.FINAL_ONLY)
        for prompt in ([5], [6], [7]):  # the end of the last request of this id is told while the next one runs
            dropped, mailbox = Mailbox(), Mailbox()
            client.submit("same", dropped, prompt, long)
            await dropped.take()
            client.drop("same", dropped)
            client.submit("same", mailbox, prompt, short)
            (output,) = await mailbox.take()
            assert isinstance(output, RequestOutput) and output.request_id == "same"
            assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 5
            client.drop("same", dropped)  # its own request is gone already: no other one ends
        found = await client.explain("same")  # the last of this id
        assert found is not None and found["request_id"] == "same" and found["num_output_tokens"] == [5]
        assert found["summary"][0] == "Request same is finished."
        await until_empty(client)

    with_client(tiny_model, work)


def test_ids_of_a_refused_fork_are_free_at_once(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=200)
        async with contextlib.aclosing(client.generate([5] * 40, params, "parent")) as parent:
            await anext(parent)
            for options in ({"client": "bob"}, {"index": 3}):
                with pytest.raises(RequestError, match="'parent'"):  # by the id that the caller knows
                    await client.fork("parent", branch_ids=["x", "y"], **options)
            fork = asyncio.create_task(client.fork("parent", branch_ids=["x", "y"]))
            await asyncio.sleep(0)
            fork.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fork
            branches = await client.fork("parent", branch_ids=["x", "y"], sampling_params={"max_tokens": 5})
            for branch in branches:
                (completion,) = (await branch.result()).outputs
                assert completion.finish_reason == "length" and len(completion.token_ids) == 5
        await until_empty(client)

    with_client(tiny_model, work)


def test_closing_a_stream_ends_its_request_there_and_then(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=240)
        for _ in range(2):
            stream = client.generate([5], params, "same")
            await anext(stream)
            await stream.aclose()  # and nothing is left to the garbage collector, which would come later
            assert not await client.abort("same")
        await until_empty(client)

    with_client(tiny_model, work)


def is_empty(client: EngineClient) -> bool:
    counts = client.counts
    free = counts.num_free_blocks + counts.num_cached_blocks
    return counts.num_running == counts.num_waiting == counts.num_sequences == 0 and free == counts.num_blocks


async def until_empty(client: EngineClient) -> None:
    while not is_empty(client):
        await asyncio.sleep(0.01)


def test_forks_stream_as_in_the_same_process(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        parent = client.generate([5] * 40, SamplingParams(**GREEDY, max_tokens=200), "parent", client="alice")
        await anext(parent)
        branches = await client.fork("parent", 3, append_tokens=[7, 8], sampling_params={"max_tokens": 5})
        assert len({branch.request_id for branch in branches}) == 3
        outputs = await collect(aiter(branches[0]))
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5]
        assert all(list(output.prompt_token_ids or ())[-2:] == [7, 8] for output in outputs)
        others = await asyncio.gather(*(branch.result() for branch in branches[1:]))
        assert all(other.outputs == outputs[-1].outputs for other in others)
        killed, closed, unread = await client.fork("parent", 3, client="alice")
        assert await killed.kill()
        assert (await killed.result()).outputs[0].finish_reason == "abort"
        await anext(aiter(closed))
        await closed.close()
        await unread.close()
        await parent.aclose()
        await until_empty(client)
        assert client.counts.forked == 6 and client.num_queued() == 0

    with_client(tiny_model, work)


def test_forks_that_are_refused_leave_nothing(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=200)
        parent = client.generate([5] * 40, params, "parent", client="alice")
        await anext(parent)
        for options, param in (
            ({"request_id": "nobody"}, "request_id"),
            ({"client": "bob"}, "request_id"),
            ({"index": 3}, "index"),
            ({"n": 0}, "n"),
            ({"branch_ids": ["x", "x"]}, "n"),
            ({"branch_ids": ["parent"]}, "request_id"),
            ({"append_tokens": [1000]}, "prompt"),
            ({"append_tokens": [5] * 300}, "prompt"),
            ({"append_tokens": ["x"]}, "append"),
            ({"append_tokens": "\ud800"}, "append"),
            ({"append_tokens": "text"}, "append"),
            ({"sampling_params": {"temperature": -1}}, "temperature"),
            ({"sampling_params": {"temperature": object()}}, "append"),
            ({"sampling_params": SamplingParams(stop_token_ids=[1000])}, "stop_token_ids"),
        ):
            call: dict[str, Any] = {"request_id": "parent", "n": 3, **options}
            with pytest.raises(RequestError) as caught:
                await client.fork(call.pop("request_id"), **call)
            assert caught.value.param == param, options
            assert list(client._streams.by_id) == ["parent"] and not client._forks
        fork = asyncio.create_task(client.fork("parent", 3))
        await asyncio.sleep(0)
        fork.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fork
        assert list(client._streams.by_id) == ["parent"] and client.health is Health.OK
        await parent.aclose()
        await until_empty(client)
        assert client.num_queued() == 0

    with_client(tiny_model, work)


def test_a_request_is_explained_to_its_own_client(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=3)
        await collect(client.generate([*range(5, 45)], params, "first", client="alice"))
        await collect(client.generate([*range(5, 25), *range(60, 80)], params, "second", client="bob"))
        found = await client.explain("second", "bob")
        assert found is not None and found["client"] == "bob" and found["num_output_tokens"] == [3]
        difference = found["prefix"]["first_difference"]
        assert difference["position"] == 20 and difference["cached_tokens"] == [25]
        hidden = await client.explain("second", "bob", with_others=False)
        assert hidden is not None and hidden["prefix"]["first_difference"]["cached_tokens"] is None
        assert not any("25" in sentence for sentence in hidden["summary"])
        assert await client.explain("second", "alice") is None
        assert await client.explain("second") == found
        assert await client.explain("third", "bob") is None and not client._questions

    with_client(tiny_model, work)


def test_a_dying_engine_answers_forks_and_questions(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        parent = client.generate([5], SamplingParams(**GREEDY, max_tokens=240), "parent")
        await anext(parent)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        fork = asyncio.create_task(client.fork("parent", 2))
        question = asyncio.create_task(client.explain("parent"))
        await asyncio.sleep(0.05)
        os.kill(client.pid, signal.SIGKILL)
        for task in (fork, question):
            with pytest.raises(EngineDeadError):
                await task
        with pytest.raises(EngineDeadError):
            await client.fork("parent")
        with pytest.raises(EngineDeadError):
            await client.explain("parent")
        assert not client._streams.by_id and not client._streams.by_key

    with_client(tiny_model, work)


def test_a_killed_engine_is_started_again_with_pauses(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: EngineClient) -> None:
        params = SamplingParams(**GREEDY, max_tokens=240)
        stream = client.generate([5], params)
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collect(stream)
        assert client.health is Health.DEAD
        with pytest.raises(EngineDeadError, match="try again"):
            await collect(client.generate([5], params))
        while client.health is not Health.OK:
            await asyncio.sleep(0.01)
        assert client.num_restarts == 1
        assert len(await collect(client.generate([5], SamplingParams(**GREEDY, max_tokens=3)))) == 3

    with_client(tiny_model, work)
    assert "the engine has died: killed by signal 9" in caplog.text


def test_stopping_while_the_engine_is_being_started_again(tiny_model: Path) -> None:
    async def work(client: EngineClient) -> None:
        killed = client.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        while client.pid in (None, killed):
            await asyncio.sleep(0.01)
        assert client.health is Health.DEAD  # with_client stops it now: it must stay stopped

    with_client(tiny_model, work)


def test_stuck_is_seen_by_steps(tiny_model: Path) -> None:
    now = 0.0

    async def work(client: EngineClient) -> None:
        nonlocal now
        stream = client.generate([5], SamplingParams(**GREEDY, max_tokens=240))
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)  # what was on its way arrives
        now += 9
        assert client.health is Health.OK
        now += 2
        assert client.health is Health.STUCK
        os.kill(client.pid, signal.SIGCONT)
        await collect(stream)
        assert client.health is Health.OK
        now += 1000  # nothing to do is no reason to worry
        assert client.health is Health.OK

    with_client(tiny_model, work, stall_timeout_s=10.0, clock=lambda: now)


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(model=str(tmp_path)))
        with pytest.raises(ModelError, match=r"config\.json"):
            await client.start()

    asyncio.run(main())


def test_text_prompts_need_a_tokenizer_that_is_there(stories: Path) -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(model=str(stories), num_threads=1))
        await client.start()
        params = SamplingParams(temperature=0, max_tokens=4, output_kind=RequestOutputKind.FINAL_ONLY)
        (output,) = await collect(client.generate("Once upon a time", params))
        assert output.outputs[0].text == ", there was a" and output.prompt_token_ids == [1, 403, 407, 261, 378]
        with pytest.raises(RequestError):
            await collect(client.generate("\ud800", params))
        await client.stop()

    asyncio.run(main())
