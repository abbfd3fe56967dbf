"""Forks of running requests: they share blocks with their parent, say what a fresh request would, and leave it alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncEngine, SamplingParams
from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.errors import RequestError
from quire.outputs import RequestOutput
from support import assert_nothing_leaked

OPTIONS: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 8}
PROMPT = [5, 9, 13, 17, 21] * 7  # 35 tokens: two full blocks and a part of one
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def make_engine(tiny_model: Path) -> Any:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(EngineConfig(model=str(tiny_model), **{**OPTIONS, **options})))
        return made[-1]

    yield make
    for engine in made:
        engine.shutdown()


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{**GREEDY, "max_tokens": 40, **options})


def run(engine: Engine, steps: int = -1) -> dict[str, RequestOutput]:
    """The last output of each request."""
    found: dict[str, RequestOutput] = {}
    while engine.has_unfinished and steps:
        found |= {output.request_id: output for output in engine.step()}
        steps -= 1
    return found


def tokens(output: RequestOutput, index: int = 0) -> list[int]:
    return list(output.outputs[index].token_ids)


def alone(engine: Engine, prompt: list[int], **options: Any) -> list[int]:
    engine.add_request("alone", {"prompt_token_ids": prompt}, params(**options))
    return tokens(run(engine)["alone"])


def held(engine: Engine) -> int:
    return engine.kv.pool.num_held


# -- the engine --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("append", [None, [30, 31, 32], [40] * 20])
def test_a_branch_says_what_a_fresh_request_would(
    make_engine: Callable[..., Engine], caching: bool, append: list[int] | None
) -> None:
    engine = make_engine(enable_prefix_caching=caching)
    expected = alone(engine, PROMPT)
    engine.add_request("parent", PROMPT, params())
    run(engine, 12)
    engine.fork("parent", ["a", "b"], append=append, params=params(max_tokens=15))
    found = run(engine)
    prompt = list(found["a"].prompt_token_ids or ())
    assert prompt == list(found["b"].prompt_token_ids or ())
    said = prompt[len(PROMPT) : len(prompt) - len(append or ())]
    assert said and said == expected[: len(said)]
    assert tokens(found["parent"]) == expected  # undisturbed
    assert tokens(found["a"]) == tokens(found["b"]) == alone(engine, prompt, max_tokens=15)
    assert_nothing_leaked(engine)


def test_branches_share_the_parents_blocks(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(enable_prefix_caching=False)
    engine.add_request("parent", PROMPT, params())
    run(engine, 20)
    before = held(engine)
    engine.fork("parent", ["a", "b", "c"])
    run(engine, 2)
    # each branch has a copy of the block that it writes into, and nothing else of its own
    assert held(engine) <= before + 4
    usage = engine.slot_usage()
    assert usage.shared >= 3 * (before - 1) * engine.kv.block_size
    for branch in ("a", "b", "c"):
        explanation = engine.explain(branch)
        assert explanation is not None and explanation["prefix"]["from_fork"]
        assert explanation["prefix"]["num_cached_tokens"] >= len(PROMPT)
    run(engine)
    assert_nothing_leaked(engine)


def test_a_killed_branch_gives_its_blocks_back_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(enable_prefix_caching=False)
    expected = alone(engine, PROMPT)
    engine.add_request("parent", PROMPT, params())
    run(engine, 5)
    engine.fork("parent", ["a", "b"], append=[50] * 40)
    run(engine, 3)
    both = held(engine)
    assert engine.abort("a")
    assert held(engine) <= both - 2  # the appended tokens' blocks are a's alone
    found = run(engine)
    assert found["a"].outputs[0].finish_reason == "abort"
    assert tokens(found["parent"]) == expected
    assert found["b"].outputs[0].finish_reason == "length"
    assert_nothing_leaked(engine)


def test_a_branch_outlives_its_parent(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add_request("parent", PROMPT, params())
    run(engine, 5)
    engine.fork("parent", ["a"])
    engine.abort("parent")  # before the branch has run at all
    found = run(engine)
    assert tokens(found["a"]) == alone(
        engine, list(found["a"].prompt_token_ids or ()), max_tokens=len(tokens(found["a"]))
    )
    assert_nothing_leaked(engine)


def test_a_request_that_waits_can_be_forked(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request("first", [7] * 9, params(max_tokens=20))
    run(engine, 2)
    engine.add_request("parent", PROMPT, params(max_tokens=10))
    engine.fork("parent", ["a"], append=[3])
    found = run(engine)
    assert tokens(found["parent"]) == alone(engine, PROMPT, max_tokens=10)
    assert tokens(found["a"]) == alone(engine, [*PROMPT, 3], max_tokens=10)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("caching", [True, False])
def test_a_fork_of_a_preempted_request_is_right(make_engine: Callable[..., Engine], mode: str, caching: bool) -> None:
    engine = make_engine(
        num_gpu_blocks_override=12, max_model_len=192, preemption_mode=mode, enable_prefix_caching=caching
    )
    engine.add_request("first", [7] * 60, params(max_tokens=60))
    engine.add_request("parent", PROMPT, params(max_tokens=80))
    found: dict[str, RequestOutput] = {}
    while (group := engine.get_group("parent")) is not None and not group.num_preemptions:
        found |= run(engine, 1)
    assert group is not None and engine.scheduler.num_waiting
    engine.fork("parent", ["a", "b"], params=params(max_tokens=20))
    found |= run(engine)
    prompt = list(found["a"].prompt_token_ids or ())
    expected = alone(engine, PROMPT, max_tokens=80)
    assert tokens(found["parent"]) == expected
    assert prompt == [*PROMPT, *expected][: len(prompt)]
    assert tokens(found["a"]) == tokens(found["b"]) == alone(engine, prompt, max_tokens=20)
    assert_nothing_leaked(engine)


def test_each_completion_of_a_parent_can_be_forked(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add_request("parent", PROMPT, SamplingParams(n=3, seed=1, max_tokens=40, ignore_eos=True))
    run(engine, 8)
    for index in range(3):
        engine.fork("parent", [f"branch-{index}"], params=params(max_tokens=5), index=index)
    found = run(engine)
    for index in range(3):
        prompt = list(found[f"branch-{index}"].prompt_token_ids or ())
        assert prompt == [*PROMPT, *tokens(found["parent"], index)][: len(prompt)]
        assert tokens(found[f"branch-{index}"]) == alone(engine, prompt, max_tokens=5)


def test_a_mapping_changes_some_of_the_parents_parameters(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add_request("parent", PROMPT, params(allowed_token_ids=[40, 41]))
    run(engine, 5)
    engine.fork("parent", ["a", "b"], params={"temperature": 1.0, "seed": 3})
    with pytest.raises(RequestError) as caught:
        engine.fork("parent", ["c"], params={"temperature": -1})
    assert caught.value.param == "temperature"
    found = run(engine)
    assert set(tokens(found["a"])) | set(tokens(found["b"])) == {40, 41} and tokens(found["a"]) != tokens(found["b"])
    assert len(found["a"].prompt_token_ids or ()) + len(tokens(found["a"])) == len(PROMPT) + 40


def test_what_cannot_be_forked_leaves_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_gpu_blocks_override=8, max_model_len=128)
    engine.add_request("parent", PROMPT, params(max_tokens=20), client="alice")
    engine.add_request("beams", [5], SamplingParams(use_beam_search=True, n=2, max_tokens=20, ignore_eos=True))
    run(engine, 3)
    for options, param in (
        ({"request_id": "nobody"}, "request_id"),
        ({"request_id": "beams"}, "request_id"),
        ({"client": "bob"}, "request_id"),
        ({"index": 1}, "index"),
        ({"branch_ids": []}, "n"),
        ({"branch_ids": ["x", "beams"]}, "request_id"),  # in use
        ({"append": [96]}, "prompt"),
        ({"append": [5] * 100}, "prompt"),  # longer than max_model_len
        ({"params": params(stop_token_ids=[96])}, "stop_token_ids"),
    ):
        call = {"request_id": "parent", "branch_ids": ["x", "y"], **options}
        with pytest.raises(RequestError) as caught:
            engine.fork(call.pop("request_id"), call.pop("branch_ids"), **call)
        assert caught.value.param == param, options
        assert engine.get_group("x") is None and engine.get_group("y") is None
    found = run(engine)
    assert found["parent"].outputs[0].finish_reason == "length"
    with pytest.raises(RequestError):
        engine.fork("parent", ["z"])  # it has finished
    assert_nothing_leaked(engine)


# -- the asynchronous engine -------------------------------------------------------------------------------------------------
def with_async_engine(model: Path, work: Callable[[AsyncEngine], Coroutine[Any, Any, None]], **options: Any) -> None:
    engine = AsyncEngine(str(model), **{**OPTIONS, **options})

    async def main() -> None:
        await work(engine)
        while await asyncio.wrap_future(engine._call(lambda: engine.engine.has_unfinished)):
            await asyncio.sleep(0.001)

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
        assert_nothing_leaked(engine.engine)
    finally:
        engine.shutdown()


async def first_of(stream: AsyncIterator[RequestOutput], count: int) -> RequestOutput:
    for _ in range(count):
        output = await anext(stream)
    return output


def test_branches_stream_and_several_can_be_waited_for(tiny_model: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        parent = engine.generate(PROMPT, params(max_tokens=200), "parent")
        await first_of(parent, 3)
        branches = await engine.fork("parent", 3, append_tokens=[50], sampling_params={"max_tokens": 6})
        assert len({branch.request_id for branch in branches}) == 3
        outputs = [output async for output in branches[0]]
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
        second, third = await asyncio.gather(*(branch.result() for branch in branches[1:]))
        assert tokens(second) == tokens(third) == tokens(outputs[-1])
        assert not await branches[0].kill()  # it has ended
        explanation = await engine.explain(branches[0].request_id)
        assert explanation is not None and explanation["prefix"]["from_fork"]
        assert await engine.explain("nobody") is None
        assert await engine.abort("parent")
        last = [output async for output in parent][-1]
        assert last.outputs[0].finish_reason == "abort"

    with_async_engine(tiny_model, work)


def test_killed_and_closed_branches_end(tiny_model: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        parent = engine.generate(PROMPT, params(max_tokens=200), "parent")
        await first_of(parent, 3)
        killed, closed, unread = await engine.fork("parent", 3)
        await anext(aiter(closed))
        assert await killed.kill()
        assert (await killed.result()).outputs[0].finish_reason == "abort"
        await closed.close()
        await unread.close()
        grandchild = (await engine.fork("parent", 1, branch_ids=["own"]))[0]
        assert grandchild.request_id == "own"
        with pytest.raises(RequestError, match="no request"):
            await engine.fork("nobody")
        with pytest.raises(RequestError, match="no request"):
            await engine.fork("parent", client="somebody")
        await asyncio.gather(grandchild.result(), engine.abort("parent"))

    with_async_engine(tiny_model, work)
