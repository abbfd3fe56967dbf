"""Beam search beside transformers' own, token for token and score for score, by every way that the engine may take.

A drawn subset runs with the suite; all of it:  python tests/engine/test_beam_search.py --cases 240

Where two candidates that the reference had to choose between are closer than 1e-4 (`Reference.margin`), either choice is
right: such cases are counted and printed. Bad words are drawn such that none begins in the prompt: with us as with vLLM they
count in the output only, with transformers in prompt and output; and none is an end token, which transformers would not ban.
"""

import argparse
import asyncio
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, AsyncEngine, SamplingParams
from quire.core.beam import Beam
from quire.core.preemption import Preemption
from quire.errors import RequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.pocket import model_directory
from quire.sampling_params import BeamSearchParams, RequestOutputKind

sys.path.insert(0, str(Path(__file__).parent.parent))  # where this file is run by itself
from support import SHARED, assert_nothing_leaked

CLOSE = 1e-4
MAX_PROMPT, MAX_NEW = 40, 24
MAX_MODEL_LEN = MAX_PROMPT + MAX_NEW
# A random model's logits must differ by more than rounding: hence the wide initializer_range.
RANDOM_CONFIG = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "windowed": {"model_type": "mistral", "sliding_window": 11, "num_key_value_heads": 1},
    "biased": {"model_type": "qwen2", "num_key_value_heads": 4, "hidden_size": 64, "num_hidden_layers": 3},
}
TEXTS = {
    "stories": [
        "Once upon a time",
        "Lily went to the park",
        "The dog was very",
        "Tom and his mom",
        "One day, a",
        "She said",
    ],
    "pocket": [
        "def area(width, height):\n",
        "import os\n",
        "What does os.path.join do?",
        "class Node:\n    def",
        "for i in",
    ],
}


# -- the reference ----------------------------------------------------------------------------------------------------------
@dataclass
class Reference:
    """What transformers' generate gives: for each returned beam its tokens and score; the narrowest choice that led to it."""

    tokens: list[list[int]]
    scores: list[float]
    margin: float


class _Watch:
    """Stands in for a model's beam search helpers and notes how narrow their choices were, in log probability.

    Choices are: which candidates go on, which end, which hypotheses stay, whether the search is over, the final order.
    """

    def __init__(self, model: Any, width: int, length_penalty: float) -> None:
        self.margin = math.inf
        self._width, self._penalty = width, length_penalty
        self._ranked = torch.zeros(0)
        self._lengths: dict[float, int] = {}  # of hypotheses, by score
        for name in ("_get_top_k_continuations", "_get_running_beams_for_next_iteration", "_update_finished_beams"):
            setattr(model, name, self._watched(getattr(type(model), name).__get__(model), getattr(self, name)))
        check = type(model)._check_early_stop_heuristic
        model._check_early_stop_heuristic = self._watched(check, self._check)

    @staticmethod
    def _watched(real: Any, note: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            note(result, **kwargs)
            return result

        return called

    def _note(self, gap: float) -> None:
        if not math.isnan(gap):
            self.margin = min(self.margin, abs(gap))

    def _in_logprob(self, one: float, other: float, *lengths: int) -> float:
        """A gap of two normalized scores, as one of log probabilities."""
        factors = [length**self._penalty for length in lengths]
        return abs(one - other) * min(factors, default=1.0)

    def _get_top_k_continuations(
        self, result: Any, accumulated_log_probs: torch.Tensor, beams_to_keep: int, **_: Any
    ) -> None:
        self._ranked = result[0][0]

    def _get_running_beams_for_next_iteration(
        self, result: Any, topk_log_probs: torch.Tensor, next_token_hits_stopping_criteria: torch.Tensor, **_: Any
    ) -> None:
        scores, ends = topk_log_probs[0].tolist(), next_token_hits_stopping_criteria[0].tolist()
        width = self._width
        going = [score for score, end in zip(scores, ends) if not end]
        if len(going) > width:
            self._note(going[width - 1] - going[width])
        # one that ends counts only above the rank of `width`: who is just above, and just below?
        above = [score for score, end in zip(scores[:width], ends) if end]
        below = [score for score, end in zip(scores[width:], ends[width:]) if end]
        if above:
            self._note(above[-1] - scores[width])
        if below:
            self._note(scores[width - 1] - below[0])

    def _update_finished_beams(
        self, result: Any, beam_scores: torch.Tensor, is_sent_finished: torch.Tensor, **kwargs: Any
    ) -> None:
        length = kwargs["cur_len"] + 1 - kwargs["decoder_prompt_len"]
        ended = kwargs["next_token_hits_stopping_criteria"][0] & kwargs["top_num_beam_mask"]
        new = (kwargs["topk_log_probs"][0][ended] / length**self._penalty).tolist()
        old = beam_scores[0][is_sent_finished[0]].tolist()
        self._lengths.update(dict.fromkeys(new, length))
        merged = sorted(old + new, reverse=True)
        if new and len(merged) > self._width:
            kept, lost = merged[self._width - 1 : self._width + 1]
            self._note(self._in_logprob(kept, lost, *(self._lengths.get(score, length) for score in (kept, lost))))

    def _check(self, result: Any, **kwargs: Any) -> None:
        if not bool(kwargs["is_sent_finished"].all()) or kwargs["early_stopping"] is True:
            return
        never = kwargs["early_stopping"] == "never" and self._penalty > 0
        length = (kwargs["max_length"] if never else kwargs["cur_len"]) - kwargs["decoder_prompt_len"]
        best = float(kwargs["running_beam_scores"][0, 0]) / length**self._penalty
        if best > -1e8:
            worst = float(kwargs["beam_scores"].min())
            self._note(self._in_logprob(best, worst, length, self._lengths.get(worst, length)))

    def note_order(self, scores: list[float], lengths: list[int]) -> None:
        for i in range(len(scores) - 1):
            self._note(self._in_logprob(scores[i], scores[i + 1], lengths[i], lengths[i + 1]))


class Transformers:
    """A model of transformers, in float32 on the CPU."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model.generation_config = type(self.model.generation_config)()  # what it recommends is not what is asked

    def generate(
        self, prompt: list[int], width: int, max_tokens: int, num_return: int = 1, **settings: Any
    ) -> Reference:
        """Beam search; with a width of 1 by the same code, which `generate` alone would not choose."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            num_beams=width,
            max_new_tokens=max_tokens,
            num_return_sequences=num_return,
            do_sample=False,
            pad_token_id=-1 if settings.get("eos_token_id") is None else settings["eos_token_id"][0],
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        watch = _Watch(self.model, width, settings.get("length_penalty", 1.0))
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                custom_generate=lambda model, *args, **kwargs: model._beam_search(*args, **kwargs),
            )
        ends = set(settings.get("eos_token_id") or ())
        least = settings.get("min_new_tokens") or 0
        tokens = []
        for row in found.sequences[:, len(prompt) :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends and i >= least), len(row) - 1)
            tokens.append(row[: end + 1])
        scores = found.sequences_scores.tolist()
        watch.note_order(scores, list(map(len, tokens)))
        return Reference(tokens, scores, watch.margin)


# -- cases ------------------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """One request, as it is asked of both; `right` is the reference's answer."""

    prompt: list[int]
    params: BeamSearchParams
    features: tuple[str, ...]
    ends: tuple[int, ...]
    right: Reference


@dataclass
class Model:
    """A model that both load, and what its requests are made of."""

    name: str
    directory: Path
    reference: Transformers = field(init=False)
    llm: LLM = field(init=False)

    def __post_init__(self) -> None:
        self.reference = Transformers(self.directory)
        self.llm = self.load()

    def load(self, **options: Any) -> LLM:
        defaults = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 48, "max_model_len": MAX_MODEL_LEN}
        return LLM(str(self.directory), **{**defaults, "num_gpu_blocks_override": 4000, **options})

    def draw(self, rng: random.Random, width: int) -> Case:
        tokenizer, vocab = self.llm.get_tokenizer(), self.llm.engine.model.vocab_size
        texts = TEXTS.get(self.name)
        if texts and rng.random() < 0.6:
            prompt = tokenizer.encode(rng.choice(texts))[:MAX_PROMPT]
        else:
            prompt = [rng.randrange(5, vocab) for _ in range(rng.randint(1, MAX_PROMPT))]
        max_tokens = rng.randint(1, MAX_NEW)
        features = []
        own: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        ends = list(self.llm.engine.model.eos_token_ids)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)

        length_penalty = rng.choice([-1.0, 0.0, 1.0, 1.0, 2.0, 0.6])
        early_stopping = rng.choice([True, False, "never"])
        features += [f"length_penalty {length_penalty:g}", f"early_stopping {early_stopping}"]
        for both in (own, theirs):
            both.update(length_penalty=length_penalty, early_stopping=early_stopping)
        if rng.random() < 0.2:
            features.append("ignore_eos")
            own["ignore_eos"], ends = True, []
        if rng.random() < 0.3:
            own["repetition_penalty"] = theirs["repetition_penalty"] = rng.choice([1.2, 0.8, 2.0])
            features.append("repetition_penalty")

        # what beams would say anyway is what ends and bad words are made of: others would hardly matter
        wants_ends, wants_words = rng.random() < 0.6, rng.random() < 0.35
        likely: list[list[int]] = []
        if wants_ends or wants_words:
            plain = self.reference.generate(
                prompt, width, max_tokens, width, **{**theirs, "eos_token_id": ends or None}
            )
            likely = plain.tokens
        if wants_ends:
            stops = sorted({rng.choice(rng.choice(likely)) for _ in range(rng.choice([1, 2, 4]))} - set(ends))
            if stops:
                own["stop_token_ids"] = stops
                ends = ends + stops
        if wants_words and (words := self._bad_words(rng, prompt, likely, ends)):
            own["bad_words"], theirs["bad_words_ids"] = words
            features.append("bad words")
            if any(len(ids) > 1 for ids in theirs["bad_words_ids"]):
                features.append("bad words of several tokens")
        if len(ends) > 1:
            features.append("several ends")
        if rng.random() < 0.35 and max_tokens > 1:
            own["min_tokens"] = theirs["min_new_tokens"] = rng.randint(1, max_tokens)
            features.append("min_new_tokens")
        num_return = rng.randint(1, width)
        if num_return < width:
            features.append("num_return_sequences")
        params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, n=num_return, **own)
        theirs["eos_token_id"] = ends or None
        right = self.reference.generate(prompt, width, max_tokens, num_return, **theirs)
        return Case(prompt, params, tuple(features), tuple(ends), right)

    def _bad_words(
        self, rng: random.Random, prompt: list[int], likely: list[list[int]], ends: list[int]
    ) -> tuple[list[str], list[list[int]]] | None:
        tokenizer = self.llm.get_tokenizer()
        found: list[str] = []
        ids: list[list[int]] = []
        for _ in range(rng.randint(1, 4)):
            tokens = rng.choice(likely)
            start, length = rng.randrange(len(tokens)), rng.choice([1, 1, 2, 3])
            word = tokenizer.decode(tokens[start : start + length]).strip()
            encoded = tokenizer.encode_bad_words([word]) if word else []
            begins_in_prompt = any(prompt[-k:] == one[:k] for one in encoded for k in range(1, len(one)))
            if (
                encoded
                and not begins_in_prompt
                and all(len(one) <= 6 and one not in [[end] for end in ends] for one in encoded)
            ):
                found.append(word)
                ids += encoded
        return (found, ids) if found else None


def make_random_model(directory: Path, name: str, tokenizer_from: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**RANDOM_CONFIG, **RANDOM_MODELS[name]}
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / file, directory / file)
    return directory


def draw_cases(model: Model, count: int, seed: int) -> list[Case]:
    rng = random.Random(f"{model.name} {seed}")
    return [model.draw(rng, 1 + (i + seed) % 10) for i in range(count)]


# -- comparing --------------------------------------------------------------------------------------------------------------
@dataclass
class Tally:
    """What was compared."""

    equal: int = 0
    either: int = 0  # differ, where either is right
    narrow: int = 0  # cases whose margin is so small, equal or not
    worst: float = 0.0  # largest difference of a cumulative log probability

    def compare(self, case: Case, found: list[CompletionOutput]) -> None:
        right = case.right
        self.narrow += right.margin < CLOSE
        tokens = [list(output.token_ids) for output in found]
        if tokens != right.tokens:
            told = f"\n{case.params}\nprompt {case.prompt}\nours   {tokens}\n{[output.beam_score for output in found]}"
            assert right.margin < CLOSE, f"{told}\ntheirs {right.tokens}\n{right.scores}\nmargin {right.margin}"
            self.either += 1
            return
        for output, score in zip(found, right.scores, strict=True):
            length = len(output.token_ids)
            total = score * length**case.params.length_penalty
            assert output.cumulative_logprob is not None and output.beam_score is not None
            self.worst = max(self.worst, abs(output.cumulative_logprob - total))
            assert output.cumulative_logprob == pytest.approx(total, abs=CLOSE, rel=1e-5)
            assert output.beam_score == pytest.approx(score, abs=CLOSE, rel=1e-5)
            assert output.beam_score == pytest.approx(
                output.cumulative_logprob / length**case.params.length_penalty, rel=1e-6
            )
            is_stopped = output.token_ids[-1] in case.ends
            assert output.finish_reason == ("stop" if is_stopped else "length")
            stops = case.params.stop_token_ids or ()
            assert output.stop_reason == (output.token_ids[-1] if output.token_ids[-1] in stops else None)
        assert [output.index for output in found] == list(range(len(found)))
        self.equal += 1


def run_beams(llm: LLM, cases: list[Case]) -> list[list[CompletionOutput]]:
    params = [case.params.sampling_params() for case in cases]
    found = llm.generate([case.prompt for case in cases], params, use_tqdm=False)
    assert_nothing_leaked(llm.engine)
    return [result.outputs for result in found]


@dataclass
class Alone:
    """A request of another kind, and what it gives alone."""

    prompt: list[int]
    params: SamplingParams
    right: RequestOutput


def others(cases: list[Case]) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of other kinds, with prompts that beams have too."""
    prompts = [case.prompt for case in cases]
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7, "top_p": 0.9},
        {"temperature": 0.8, "seed": 8, "n": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "seed": 9, "n": 2, "best_of": 4},
    ]
    params = [
        SamplingParams(max_tokens=3 + i % MAX_NEW, ignore_eos=i % 2 > 0, **kinds[i % 5]) for i in range(len(prompts))
    ]
    return prompts, params


def run_mixed(llm: LLM, cases: list[Case], tally: Tally, alone: list[Alone]) -> None:
    """Beams and others at once, in turns; the others' tokens are those that they have alone."""
    prompts, params = [one.prompt for one in alone], [one.params for one in alone]
    mixed = llm.generate(
        [prompt for case, other in zip(cases, prompts) for prompt in (case.prompt, other)],
        [one for case, other in zip(cases, params) for one in (case.params.sampling_params(), other)],
        use_tqdm=False,
    )
    assert_nothing_leaked(llm.engine)
    for case, result in zip(cases, mixed[::2]):
        tally.compare(case, result.outputs)
    for result, right in zip(mixed[1::2], (one.right for one in alone)):
        mine, alones = ([list(output.token_ids) for output in one.outputs] for one in (result, right))
        assert mine == alones, f"prompt {right.prompt_token_ids}\n{mine}\nalone\n{alones}\n{right.outputs}"
        assert [o.index for o in result.outputs] == [o.index for o in right.outputs]


def run_alone(llm: LLM, cases: list[Case]) -> list[Alone]:
    """The other requests, one at a time."""
    asked = zip(*others(cases))
    return [Alone(prompt, params, llm.generate([prompt], params, use_tqdm=False)[0]) for prompt, params in asked]


def few_blocks(cases: list[Case], block_size: int) -> int:
    """No more than what the largest of them may need when it is alone."""
    most = 0
    for case, other in zip(cases, others(cases)[1]):
        prompt = len(case.prompt)
        asked = [(case.params.beam_width, case.params.max_tokens), (other.num_sequences, other.max_tokens or 0)]
        for n, max_tokens in asked:
            whole = -(-(prompt + max_tokens - 1) // block_size)
            most = max(most, prompt // block_size + n * (whole - prompt // block_size))
    return most


WAYS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "mixed, 2 in flight, chunks of 5": {"max_steps_in_flight": 2, "max_num_batched_tokens": 5},
    "mixed, 4 in flight, block 1": {"max_steps_in_flight": 4, "block_size": 1},
    "mixed, 3 in flight, block 7, no cache": {
        "max_steps_in_flight": 3,
        "block_size": 7,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 40,
    },
    "recompute": {"preemption_mode": "recompute", "few": True},
    "recompute, 3 in flight, block 7, no cache": {
        "preemption_mode": "recompute",
        "few": True,
        "max_steps_in_flight": 3,
        "block_size": 7,
        "enable_prefix_caching": False,
    },
    "swap": {"preemption_mode": "swap", "few": True},
    "swap, 4 in flight, block 1": {"preemption_mode": "swap", "few": True, "max_steps_in_flight": 4, "block_size": 1},
    "swap, 2 in flight, chunks of 6": {
        "preemption_mode": "swap",
        "few": True,
        "max_steps_in_flight": 2,
        "max_num_batched_tokens": 6,
    },
    "recompute, 2 in flight, chunks of 12": {
        "preemption_mode": "recompute",
        "few": True,
        "max_steps_in_flight": 2,
        "max_num_batched_tokens": 12,
    },
}


def run_way(model: Model, cases: list[Case], way: str, alone: list[Alone], batch: int = 20) -> tuple[Tally, int]:
    """All cases, `batch` of them at a time beside as many others. Returns how often a beam search was preempted, too."""
    options = dict(WAYS[way])
    tally = Tally()
    if is_short := options.pop("few", False):
        options["num_gpu_blocks_override"] = few_blocks(cases, options.get("block_size", 16))
    preempted: Counter[Preemption] = Counter()
    with model.load(**options) as llm:
        llm.engine.scheduler._on_preempt = lambda group, note: preempted.update([note.way] * (group.beam is not None))
        for start in range(0, len(cases), batch):
            run_mixed(llm, cases[start : start + batch], tally, alone[start : start + batch])
    return tally, preempted[Preemption(options["preemption_mode"])] if is_short else 0


# -- with the suite ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def story(stories: Path) -> Iterator[Model]:
    made = Model("stories", stories)
    yield made
    made.llm.shutdown()


@pytest.fixture(scope="module")
def story_cases(story: Model) -> list[Case]:
    return draw_cases(story, 20, seed=1)


@pytest.fixture(scope="module")
def story_alone(story: Model, story_cases: list[Case]) -> list[Alone]:
    return run_alone(story.llm, story_cases)


def tell(name: str, tally: Tally, preempted: int = 0) -> None:
    print(
        f"\n{name}: {tally.equal} equal, {tally.either} differ where either is right, of {tally.narrow} with a margin under "
        f"{CLOSE:g}; largest difference of a cumulative log probability {tally.worst:.1e}; {preempted} preemptions of beams"
    )
    assert tally.either <= 1 + (tally.equal + tally.either) // 25, "too often on the edge to prove anything"


def test_beams_and_scores_of_the_reference_alone(story: Model, story_cases: list[Case]) -> None:
    tally = Tally()
    for case in story_cases:
        tally.compare(case, run_beams(story.llm, [case])[0])
        if case.params.n == case.params.beam_width:  # by the interface of vLLM's users
            (found,) = story.llm.beam_search([case.prompt], case.params)
            assert [beam.tokens[len(case.prompt) :] for beam in found.sequences] == case.right.tokens
            assert [beam.score for beam in found.sequences] == pytest.approx(case.right.scores, abs=CLOSE)
    tell("alone", tally)
    told = Counter(feature for case in story_cases for feature in case.features)
    for feature in ("bad words", "several ends", "min_new_tokens", "repetition_penalty", "num_return_sequences"):
        assert told[feature], f"no case has {feature}: draw with another seed"


@pytest.mark.parametrize("way", WAYS)
def test_beams_beside_others(story: Model, story_cases: list[Case], story_alone: list[Alone], way: str) -> None:
    tally, preempted = run_way(story, story_cases, way, story_alone)
    tell(way, tally, preempted)
    assert preempted > 0 or "few" not in WAYS[way], "no beam search was preempted"


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_warm_prefix_cache(story: Model, story_cases: list[Case], in_flight: int) -> None:
    tally = Tally()
    with story.load(max_steps_in_flight=in_flight, block_size=4) as llm:
        for _ in range(2):
            for case, found in zip(story_cases, run_beams(llm, story_cases)):
                tally.compare(case, found)
        hits = llm.engine.kv.num_prefix_hits
        run_beams(llm, story_cases)
        assert llm.engine.kv.num_prefix_hits - hits >= sum(len(case.prompt) - 1 for case in story_cases)
    tell("warm", tally)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_models(stories: Path, tmp_path: Path, name: str) -> None:
    model = Model(name, make_random_model(tmp_path, name, stories))
    cases = draw_cases(model, 10, seed=2)
    alone = run_alone(model.llm, cases)
    for way in ("mixed, 2 in flight, chunks of 5", "mixed, 3 in flight, block 7, no cache"):
        tell(f"{name}, {way}", *run_way(model, cases, way, alone))
    if name != "windowed":  # whose blocks suffice
        for way in ("swap", "recompute"):
            tell(f"{name}, {way}", *run_way(model, cases, way, alone))
    model.llm.shutdown()


def test_pocket() -> None:
    model = Model("pocket", model_directory())
    cases = draw_cases(model, 6, seed=6)
    tally = Tally()
    for case, found in zip(cases, run_beams(model.llm, cases)):
        tally.compare(case, found)
    tell("pocket", tally)
    model.llm.shutdown()


# -- stop strings -----------------------------------------------------------------------------------------------------------
class _StopAt:
    """A criterion for the reference: the text of the answer has just come to hold one of `stops`."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: list[str], min_tokens: int) -> None:
        self._decode = lambda ids: tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
        self._start, self._stops, self._least = len(prompt), stops, min_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = []
        for row in input_ids[:, self._start :].tolist():
            before, text = self._decode(row[:-1]), self._decode(row)
            new = any(text.count(stop) > before.count(stop) for stop in self._stops)
            ended.append(new and len(row) > self._least)
        return torch.tensor(ended)


@pytest.mark.parametrize("stops", [[" was"], ["was a", ","], ["."], [" the", "ark"], ["e"], [" t"], ["me,"]])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 4])
def test_a_stop_string_ends_a_hypothesis(story: Model, stops: list[str], include: bool, min_tokens: int) -> None:
    tokenizer, width, max_tokens = story.llm.get_tokenizer(), 4, 14
    for text in ("Once upon a time", "Lily went to the p"):
        prompt = tokenizer.encode(text)
        criterion = _StopAt(tokenizer, prompt, stops, min_tokens)
        watch = _Watch(story.reference.model, width, 1.0)
        with torch.inference_mode():
            right = story.reference.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=max_tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                stopping_criteria=[criterion],
            )
        assert watch.margin > CLOSE
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=max_tokens,
            stop=stops,
            ignore_eos=True,
            min_tokens=min_tokens,
            include_stop_str_in_output=include,
        )
        (found,) = story.llm.beam_search([text], params)
        assert [beam.score for beam in found.sequences] == pytest.approx(right.sequences_scores.tolist(), abs=CLOSE)
        for beam, row in zip(found.sequences, right.sequences.tolist()):
            assert beam.tokens == row[: len(beam.tokens)]
            assert set(row[len(beam.tokens) :]) <= {-1}  # padding
            answer = criterion._decode(beam.tokens[len(prompt) :])
            ends = bool(criterion(torch.tensor([beam.tokens]), None)[0])
            assert beam.finish_reason == ("stop" if ends else "length")
            assert beam.text is not None and beam.text.startswith(text)
            if ends:
                assert beam.stop_reason in stops
                before = criterion._decode(beam.tokens[len(prompt) : -1])
                at = answer.index(beam.stop_reason, max(len(before) - len(beam.stop_reason) + 1, 0))
                at += len(beam.stop_reason) if include else 0
                assert beam.text == text + answer[:at]
            else:
                assert beam.text == text + answer


def stop_finder(model: Model, prompt: str, *stops: str) -> Any:
    params = BeamSearchParams(beam_width=1, max_tokens=6, stop=stops).sampling_params()
    group, _ = model.llm.engine._inputs.process("x", prompt, params, priority=0, arrival_s=0.0)
    assert group.find_stop_string is not None
    return group.find_stop_string


def test_a_stop_string_in_the_first_token_counts_its_space(story: Model) -> None:
    """The text that a caller gets begins with a space where the prompt ends in a word: so does the one that is searched."""
    (token,) = story.llm.get_tokenizer().encode_bad_words(["was"])[0]
    assert stop_finder(story, "Once upon a time", " was")(Beam(), token) == " was"
    assert stop_finder(story, "Once upon a time", "e was")(Beam(), token) is None  # the prompt is no part of the answer


def test_a_stop_string_of_a_character_in_several_tokens(story: Model) -> None:
    """Ω is two tokens here; the first leaves a replacement character that the second turns into it."""
    tokenizer = story.llm.get_tokenizer()
    first, second = tokenizer.encode("Ω", add_special_tokens=False)[-2:]
    assert tokenizer.decode([*tokenizer.encode("caf"), first, second]).endswith("Ω")
    assert stop_finder(story, "caf", "Ω")(Beam(Beam(), first, 1), second) == "Ω"


# -- log probabilities ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [0, 3])
def test_logprobs_are_those_of_the_raw_distribution(story: Model, k: int) -> None:
    prompt = story.llm.get_tokenizer().encode("Lily went to the park")
    params = BeamSearchParams(beam_width=5, max_tokens=12, logprobs=k)
    (plain,) = story.llm.beam_search([prompt], params)
    (penalized,) = story.llm.beam_search([prompt], replace(params, repetition_penalty=1.5, min_tokens=6))
    assert [beam.tokens for beam in plain.sequences] != [beam.tokens for beam in penalized.sequences]
    for beam in [*plain.sequences, *penalized.sequences]:
        with torch.inference_mode():
            logits = story.reference.model(torch.tensor([beam.tokens])).logits[0, len(prompt) - 1 : -1].float()
        right = logits.log_softmax(-1)
        answer = beam.tokens[len(prompt) :]
        assert beam.logprobs is not None and len(beam.logprobs) == len(answer)
        for row, token, told in zip(right, answer, beam.logprobs):
            assert next(iter(told)) == token  # itself first
            top = row.topk(k)
            assert set(told) == {token, *top.indices.tolist()}
            for other, logprob in told.items():
                assert logprob.logprob == pytest.approx(float(row[other]), abs=CLOSE)
                assert logprob.rank == int((row > row[other]).sum()) + 1
                assert logprob.decoded_token is not None
        if beam in plain.sequences:
            total = sum(told[token].logprob for told, token in zip(beam.logprobs, answer))
            assert beam.cum_logprob == pytest.approx(total, abs=CLOSE)


# -- streams, ends, errors --------------------------------------------------------------------------------------------------
async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


@pytest.fixture(scope="module")
def served(stories: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(str(stories), dtype="float32", num_threads=1, max_num_seqs=24, max_steps_in_flight=2)
    yield engine
    engine.shutdown()


STREAMED: list[dict[str, Any]] = [
    {"beam_width": 1, "max_tokens": 9},
    {"beam_width": 4, "max_tokens": 30, "n": 2},
    {"beam_width": 4, "max_tokens": 40, "early_stopping": True, "stop": ["."], "length_penalty": 0.0},
    {"beam_width": 3, "max_tokens": 30, "stop": ["girl", "boy"], "include_stop_str_in_output": True, "logprobs": 2},
    {"beam_width": 10, "max_tokens": 20, "early_stopping": "never", "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", STREAMED, ids=lambda settings: f"width {settings['beam_width']}")
def test_what_is_streamed_is_the_beginning_of_the_answer(served: AsyncEngine, settings: dict[str, Any]) -> None:
    def params(kind: RequestOutputKind) -> SamplingParams:
        return BeamSearchParams(**settings, output_kind=kind).sampling_params()

    async def three() -> list[list[RequestOutput]]:
        streams = [served.generate("Once upon a time", params(kind)) for kind in RequestOutputKind]
        return await asyncio.gather(*map(collect, streams))

    cumulative, deltas, final = asyncio.run(three())
    assert len(final) == 1 and final[0].finished
    n = params(RequestOutputKind.DELTA).n
    assert [output.index for output in final[0].outputs] == list(range(n))
    early = 0
    for right in final[0].outputs:
        tokens, text, logprobs = [], "", []
        for output in deltas:
            assert output.finished or output.outputs, "an output that says nothing"
            for piece in (piece for piece in output.outputs if piece.index == right.index):
                tokens += piece.token_ids
                text += piece.text
                logprobs += piece.logprobs or []
                assert list(right.token_ids)[: len(tokens)] == tokens
                assert right.text.startswith(text)
                early += not output.finished
        assert (tokens, text) == (list(right.token_ids), right.text)
        assert [list(one) for one in logprobs] == [list(one) for one in right.logprobs or []]
        last = next(piece for piece in deltas[-1].outputs if piece.index == right.index)
        assert (last.finish_reason, last.stop_reason) == (right.finish_reason, right.stop_reason)
        told = (right.beam_score, right.cumulative_logprob)
        assert (last.beam_score, last.cumulative_logprob) == pytest.approx(told, abs=CLOSE)
        for output in cumulative:
            for whole in (whole for whole in output.outputs if whole.index == right.index):
                assert list(right.token_ids)[: len(whole.token_ids)] == list(whole.token_ids)
                assert right.text.startswith(whole.text)
    assert early, "nothing came before the end"


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_an_abort_in_the_middle_leaves_nothing(story: Model, in_flight: int, steps: int) -> None:
    with story.load(max_steps_in_flight=in_flight, max_num_batched_tokens=16) as llm:
        engine = llm.engine
        params = BeamSearchParams(beam_width=6, max_tokens=24, n=3, ignore_eos=True).sampling_params()
        prompt = list(range(5, 35))
        engine.add_request("a", prompt, params)
        engine.add_request("b", prompt, params)
        for _ in range(steps):
            engine.step()
        assert engine.abort("a")
        assert not engine.abort("a")
        outputs = {}
        while engine.has_unfinished:
            outputs.update({output.request_id: output for output in engine.step()})
        assert_nothing_leaked(engine)
        aborted = outputs["a"]
        assert aborted.finished and {output.finish_reason for output in aborted.outputs} == {"abort"}
        engine.add_request("c", prompt, params)
        while engine.has_unfinished:
            outputs.update({output.request_id: output for output in engine.step()})
        assert [o.token_ids for o in outputs["b"].outputs] == [o.token_ids for o in outputs["c"].outputs]
        tokens = [list(output.token_ids) for output in aborted.outputs]
        assert all(len(one) < 24 for one in tokens)


def test_leaving_a_stream_ends_the_search(served: AsyncEngine) -> None:
    async def leave() -> None:
        params = BeamSearchParams(beam_width=5, max_tokens=200, ignore_eos=True).sampling_params()
        async for _ in served.generate("Once upon a time", params):
            break
        while await asyncio.wrap_future(served._call(lambda: served.engine.has_unfinished)):
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    assert_nothing_leaked(served.engine)


def test_a_search_that_is_left_no_token_says_so(story: Model) -> None:
    """Others in the batch go on."""
    tokenizer = story.llm.get_tokenizer()
    word = tokenizer.encode_bad_words(["was"])[0]
    assert len(word) == 1
    hopeless = BeamSearchParams(beam_width=3, max_tokens=8, allowed_token_ids=word, bad_words=["was"], ignore_eos=True)
    fine = BeamSearchParams(beam_width=3, max_tokens=8)
    params = [hopeless.sampling_params(), fine.sampling_params(), SamplingParams(temperature=0, max_tokens=8)]
    found = story.llm.generate(["Once upon"] * 3, params, use_tqdm=False)
    assert_nothing_leaked(story.llm.engine)
    (output,) = found[0].outputs
    assert (output.finish_reason, list(output.token_ids)) == ("error", [])
    assert "no token is allowed" in str(output.stop_reason)
    assert [output.finish_reason for output in found[1].outputs] == ["length"] * 3
    assert found[2].outputs[0].finish_reason == "length"
    (told,) = story.llm.beam_search(["Once upon"], hopeless)
    assert [beam.finish_reason for beam in told.sequences] == ["error"]
    assert told.sequences[0].score == -math.inf


def test_fewer_beams_than_the_width_where_bans_leave_no_more(story: Model) -> None:
    """Two tokens and three places: 2, 4, 8 continuations, of which 5 stay; all of them are found at the first lengths."""
    allowed = [286, 261]
    params = BeamSearchParams(beam_width=5, max_tokens=2, allowed_token_ids=allowed, ignore_eos=True)
    (found,) = story.llm.beam_search(["Once upon"], params)
    assert len(found.sequences) == 4
    assert {tuple(beam.tokens[-2:]) for beam in found.sequences} == {(a, b) for a in allowed for b in allowed}
    assert_nothing_leaked(story.llm.engine)


@pytest.mark.parametrize("width", [129, 0])
def test_a_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(RequestError, match="beam_width"):
        BeamSearchParams(beam_width=width, max_tokens=3)


def test_a_width_above_the_rows_is_refused(story: Model) -> None:
    with pytest.raises(RequestError, match="beam width=49 is more than max_num_seqs=48"):
        story.llm.beam_search(["Once"], BeamSearchParams(beam_width=49, max_tokens=3))
    assert_nothing_leaked(story.llm.engine)


# -- by itself: many cases --------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=240, help="over all models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=["stories", *RANDOM_MODELS, "pocket"])
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, told = time.perf_counter(), []
    stories = SHARED / "data/models/stories260K"
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            if name in RANDOM_MODELS:
                directory = make_random_model(Path(temporary), name, stories)
            else:
                directory = stories if name == "stories" else model_directory()
            model = Model(name, directory)
            count = -(-args.cases // len(args.models))
            cases = draw_cases(model, count, args.seed)
            features = Counter(feature for case in cases for feature in case.features)
            print(f"== {name}: {count} cases; {dict(sorted(features.items()))}", flush=True)
            tally = Tally()
            for case in cases:
                tally.compare(case, run_beams(model.llm, [case])[0])
            tell(f"{name}, alone", tally)
            told.append({"model": name, "way": "alone", **vars(tally)})
            alone = run_alone(model.llm, cases)
            for way in WAYS:
                if name == "windowed" and "few" in WAYS[way]:
                    continue  # behind a window there are never so few
                tally, preempted = run_way(model, cases, way, alone)
                tell(f"{name}, {way}", tally, preempted)
                told.append({"model": name, "way": way, **vars(tally), "preempted": preempted})
            model.llm.shutdown()
    for mode in Preemption:
        of_mode = [row for row in told if row["way"].startswith(mode.value)]
        assert not of_mode or sum(row["preempted"] for row in of_mode) > 0, f"{mode}: no beam search was preempted"
    compared = sum(row["equal"] + row["either"] for row in told)
    either = sum(row["either"] for row in told)
    print(f"{compared} searches compared, {either} differ where either is right, {time.perf_counter() - began:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
