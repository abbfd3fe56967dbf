"""The programs in examples/ run, and do what they say."""

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quire import AsyncEngine
from support import ROOT, assert_nothing_leaked, loaded


@pytest.fixture(scope="module")
def tree_search() -> Any:
    with loaded(ROOT / "examples" / "tree_search.py") as module:
        yield module


def test_a_tree_search_branches_scores_kills_and_shares(tiny_model: Path, tree_search: ModuleType) -> None:
    engine = AsyncEngine(
        str(tiny_model), load_format="dummy", skip_tokenizer_init=True, num_threads=1, hf_overrides={"eos_token_id": 95}
    )
    options = tree_search.Options(width=3, keep=2, depth=3, chunk=5, max_tokens=100, seed=3)
    prompt = [5, 9, 13, 17] * 20

    async def work() -> Any:
        result = await tree_search.search(engine, prompt, options)
        while await asyncio.wrap_future(engine._call(lambda: engine.engine.has_unfinished)):
            await asyncio.sleep(0.001)
        return result

    try:
        result = asyncio.run(asyncio.wait_for(work(), 60))
        assert_nothing_leaked(engine.engine)
        first, *others = result.levels
        assert (first.num_nodes, first.num_killed) == (3, 1)
        assert all(level.num_nodes <= 6 and level.num_nodes - level.num_killed == 2 for level in others)
        # the prompt's five full blocks are there once, however many branches run
        assert first.num_copied >= first.num_blocks + 2 * len(prompt) // 16
        path = result.best.path()
        assert result.best.fate == "answer" and path[0][0] is result.root and result.best.is_over
        # what the answer's branches were given is what their ancestors had said
        whole = list(prompt)
        for node, count in path:
            assert list(node.last.prompt_token_ids) == whole
            whole += node.last.outputs[0].token_ids[:count]
        assert result.best.score() == pytest.approx(
            sum(sum(node.logprobs[:count]) for node, count in path) / (len(whole) - len(prompt))
        )
        answer = tree_search.answer_of(engine, result.best)
        assert answer == " ".join(map(str, whole[len(prompt) :]))
        tree_search.draw(result.root), tree_search.memory_table(result.levels)
    finally:
        engine.shutdown()


def test_the_tree_search_runs_on_the_model_in_the_package(
    tree_search: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tree_search.main(["--max-tokens", "40", "--width", "2", "--chunk", "6", "--depth", "2"]) == 0
    printed = capsys.readouterr().out
    assert "answer" in printed and "without sharing" in printed
