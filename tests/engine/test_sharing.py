"""Blocks that answers to one prompt hold together: what the paper's sharing gives, counted block for block.

Kwon et al., SOSP 2023, section 4.4: samples share the prompt's full blocks and copy the partial one when they write into it;
beams share the blocks of all that they have in common. So a step holds as many blocks as there are different pairs of a
block's place and the tokens up to its end, over all live sequences.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.sampling_params import BeamSearchParams
from support import TINY_CONFIG, assert_nothing_leaked

SIZE = 16


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1}
    with LLM(str(directory), block_size=SIZE, enable_prefix_caching=False, **options) as made:
        yield made


def blocks(num_tokens: int) -> int:
    return -(-num_tokens // SIZE)


def distinct_blocks(paths: list[list[int]]) -> int:
    """Pairs of a block's place and the tokens up to its end, of sequences that have computed `paths`."""
    return len({(k, tuple(path[: SIZE * (k + 1)])) for path in paths for k in range(blocks(len(path)))})


def run(llm: LLM, prompt: list[int], params: SamplingParams, expected: Callable[[Any, int], int]) -> tuple[int, int]:
    """Held blocks equal `expected(group, step)` in every step; returns the peaks, as the pool and as the formula have it."""
    engine, pool = llm.engine, llm.engine.kv.pool
    engine.add_request("it", prompt, params)
    group = engine.get_group("it")
    allocate, update = pool.allocate, engine.scheduler.update
    told: list[int] = []
    peak = 0

    def watched(count: int) -> list[int]:
        nonlocal peak
        taken = allocate(count)
        peak = max(peak, pool.num_held)
        return taken

    def counted(result: Any) -> Any:
        told.append(expected(group, len(told)))
        assert pool.num_held == told[-1], f"step {len(told) - 1}"
        return update(result)

    pool.allocate, engine.scheduler.update = watched, counted
    try:
        while engine.has_unfinished:
            engine.step()
    finally:
        pool.allocate, engine.scheduler.update = allocate, update
    assert_nothing_leaked(engine)
    assert len(told) == params.max_tokens
    return peak, max(told)


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("asked", [{"n": 8}, {"n": 2, "best_of": 8}], ids=["n=8", "best_of=8"])
def test_samples_share_the_full_blocks_of_their_prompt(llm: LLM, prompt_tokens: int, asked: dict[str, int]) -> None:
    params = SamplingParams(**asked, max_tokens=50, ignore_eos=True, seed=3)
    shared = prompt_tokens // SIZE

    def expected(group: Any, step: int) -> int:
        if step == 0:
            return blocks(prompt_tokens)
        return shared + 8 * (blocks(prompt_tokens + step) - shared)

    peak, by_formula = run(llm, list(range(3, 3 + prompt_tokens)), params, expected)
    total = prompt_tokens + 49  # the last token's keys and values are not needed
    assert peak == by_formula == shared + 8 * (blocks(total) - shared)
    copies = llm.engine.kv.num_copies
    run(llm, list(range(3, 3 + prompt_tokens)), params, expected)
    assert llm.engine.kv.num_copies - copies == (7 if prompt_tokens % SIZE else 0)


def beams_of(prompt: list[int]) -> Callable[[Any, int], int]:
    def expected(group: Any, step: int) -> int:
        """The search's own tree, which knows no blocks: all live beams' tokens are computed in the step."""
        return distinct_blocks([prompt + beam.token_ids() for beam in group.beam.live])

    return expected


@pytest.mark.parametrize("width", [1, 4, 10])
@pytest.mark.parametrize("prompt_tokens", [1, 16, 29, 61])
def test_beams_share_all_that_they_have_in_common(llm: LLM, width: int, prompt_tokens: int) -> None:
    prompt = list(range(3, 3 + prompt_tokens))
    params = BeamSearchParams(beam_width=width, max_tokens=60, ignore_eos=True).sampling_params()
    peak, by_formula = run(llm, prompt, params, beams_of(prompt))
    assert peak == by_formula
    without = width * blocks(prompt_tokens + 59)
    assert by_formula < without or width == 1


@pytest.mark.parametrize("width", [4, 10])
def test_beams_of_a_trained_model(stories: Path, width: int) -> None:
    with LLM(str(stories), dtype="float32", num_threads=1, block_size=SIZE, enable_prefix_caching=False) as llm:
        prompt = llm.get_tokenizer().encode("Once upon a time there was a little girl named Lily. She loved to")
        params = BeamSearchParams(beam_width=width, max_tokens=100, ignore_eos=True).sampling_params()
        peak, by_formula = run(llm, prompt, params, beams_of(prompt))
        assert peak == by_formula
        print(f"\nwidth {width}: {peak} blocks at most, {width * blocks(len(prompt) + 99)} without sharing")
