"""`LLM` as its users meet it: prompts of all kinds, sampling, forks, log probabilities, stops."""

import gc
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.engine import CACHED_GENERATIONS
from quire.errors import CapacityError, ConfigError, EngineDeadError, ModelError, RequestError
from support import TINY_CONFIG, assert_nothing_leaked, shared_data

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def tiny(directory: Path, **options: Any) -> LLM:
    defaults = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 16}
    return LLM(str(directory), **{**defaults, **options})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return tiny(directory)


@pytest.fixture(scope="module")
def story_llm(stories: Path) -> LLM:
    return LLM(str(stories), dtype="float32", num_threads=1)


def ids_of(outputs: list[Any]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


class TestPrompts:
    def test_all_kinds_mean_the_same(self, story_llm: LLM) -> None:
        text = "Once upon a time"
        ids = story_llm.get_tokenizer().encode(text)
        kinds: list[Any] = [text, [text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}]]
        answers = [story_llm.generate(kind, GREEDY, use_tqdm=False) for kind in kinds]
        assert all(len(answer) == 1 for answer in answers)
        assert len({tuple(ids_of(answer)[0]) for answer in answers}) == 1
        assert answers[0][0].prompt == text
        assert answers[2][0].prompt is None
        legacy = story_llm.generate(prompt_token_ids=[ids], sampling_params=GREEDY, use_tqdm=False)
        assert ids_of(legacy) == ids_of(answers[0])

    def test_many_texts_are_read_like_one(self, story_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quire.engine.input.TOKENIZED_AT_ONCE", 3)
        texts = ["Once", "Once upon", "", "Lily", "Tom and Lily", "a"]
        encode = story_llm.get_tokenizer().encode
        own = {"prompt": "a text", "prompt_token_ids": encode("other tokens")}
        prompts: list[Any] = [*texts, {"prompt": "Ben", "cache_salt": "x"}, encode("tokens"), own, "the last"]
        outputs = story_llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.prompt for output in outputs] == [*texts, "Ben", None, "a text", "the last"]
        read = [list(output.prompt_token_ids or ()) for output in outputs]
        assert read == [encode(text) for text in [*texts, "Ben", "tokens", "other tokens", "the last"]]
        alone = [story_llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert ids_of(outputs) == ids_of(alone)

    def test_outputs_come_in_the_order_of_the_prompts(self, llm: LLM) -> None:
        prompts = [[i + 3] * (40 - i) for i in range(30)]
        params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, ignore_eos=True) for i in range(30)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [len(ids) for ids in ids_of(outputs)] == [1 + i % 5 for i in range(30)]
        assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)

    def test_no_prompts_no_answers(self, llm: LLM) -> None:
        assert llm.generate([], GREEDY, use_tqdm=False) == []

    def test_chat_goes_through_the_template(self, tmp_path: Path) -> None:
        tokenizer = shared_data("tokenizers/minimind")
        directory = tmp_path / "chat"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({**TINY_CONFIG, "vocab_size": 6400}))
        with LLM(str(directory), tokenizer=str(tokenizer), load_format="dummy", num_threads=1) as chat:
            messages = [{"role": "user", "content": "What does a quire hold?"}]
            one = chat.chat(messages, GREEDY, use_tqdm=False)
            many = chat.chat([messages, messages], GREEDY, use_tqdm=False)
            text = chat.get_tokenizer().decode(one[0].prompt_token_ids, skip_special_tokens=False)
            assert "What does a quire hold?" in text and "<|im_start|>" in text
            assert ids_of(many) == ids_of(one) * 2

    def test_prompts_that_share_a_salt_share_blocks_and_others_do_not(self, llm: LLM) -> None:
        prompt = list(range(3, 3 + 64))
        llm.engine.kv.pool.drop_cache()

        def cached(salt: str | None) -> int | None:
            asked = {"prompt_token_ids": prompt, "cache_salt": salt}
            return llm.generate(asked, GREEDY, use_tqdm=False)[0].num_cached_tokens

        assert [cached("a"), cached("a"), cached("b"), cached(None)] == [0, 63, 0, 0]


class TestSampling:
    def test_forks_share_the_prompt_and_draw_each_for_itself(self, llm: LLM) -> None:
        params = SamplingParams(n=8, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
        prompt = [7] * 40
        llm.engine.add_request("forks", prompt, params)
        most_held = 0
        while llm.engine.has_unfinished:
            outputs = llm.engine.step()
            most_held = max(most_held, llm.engine.kv.pool.num_held)
        (output,) = outputs
        assert [completion.index for completion in output.outputs] == list(range(8))
        assert len({tuple(ids) for ids in ids_of(outputs)}) == 8
        # 40 + 12 - 1 slots: two full blocks of the prompt are shared, two more are each sequence's own
        assert most_held == 2 + 8 * 2
        assert_nothing_leaked(llm.engine)

    def test_a_draw_does_not_depend_on_the_rest_of_the_batch(self, llm: LLM) -> None:
        params = SamplingParams(n=3, temperature=0.9, top_p=0.9, seed=11, max_tokens=10, ignore_eos=True)
        alone = ids_of(llm.generate([[9] * 20], params, use_tqdm=False))
        noise = SamplingParams(temperature=1.3, max_tokens=14, ignore_eos=True)
        prompts = [[i] * 17 for i in range(3, 9)] + [[9] * 20] + [[i] * 5 for i in range(3, 6)]
        together = llm.generate(prompts, [noise] * 6 + [params] + [noise] * 3, use_tqdm=False)
        assert ids_of([together[6]]) == alone

    def test_requests_without_a_seed_differ_and_a_new_engine_repeats_them(self, tiny_model: Path) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)

        def draw(seed: int) -> list[list[int]]:
            with tiny(tiny_model, seed=0, hf_overrides={}) as engine_a:
                return ids_of(engine_a.generate([[5] * 8] * 4, params, use_tqdm=False))

        first = draw(0)
        assert len({tuple(ids) for ids in first}) == 4
        assert draw(0) == first

    def test_many_forks_in_few_blocks_are_preempted_together_and_come_back(self, tiny_model: Path) -> None:
        params = SamplingParams(n=4, temperature=1.0, max_tokens=60, ignore_eos=True)
        prompts = [[i] * 20 for i in range(3, 9)]
        seeded = [SamplingParams(n=4, temperature=1.0, max_tokens=60, ignore_eos=True, seed=i) for i in range(6)]
        assert params.n == 4
        with tiny(tiny_model, max_num_seqs=32) as roomy:
            expected = ids_of(roomy.generate(prompts, seeded, use_tqdm=False))
        for mode in ("recompute", "swap", "auto"):
            with tiny(
                tiny_model, max_num_seqs=32, num_gpu_blocks_override=45, max_model_len=128, preemption_mode=mode
            ) as tight:
                assert ids_of(tight.generate(prompts, seeded, use_tqdm=False)) == expected
                assert sum(tight.engine.scheduler.counts.preemptions.values()) > 0
                assert_nothing_leaked(tight.engine)


class TestStops:
    def test_a_stop_string_ends_the_text_before_it(self, story_llm: LLM) -> None:
        plain = story_llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[
            0
        ].outputs[0]
        stop = plain.text[20:24]
        params = SamplingParams(temperature=0, max_tokens=60, stop=[stop])
        cut = story_llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
        assert cut.text == plain.text[: plain.text.index(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert len(cut.token_ids) < len(plain.token_ids)
        assert_nothing_leaked(story_llm.engine)

    def test_stop_tokens_min_tokens_and_the_end_token(self, llm: LLM) -> None:
        def run(**options: Any) -> Any:
            params = SamplingParams(temperature=0, max_tokens=12, **options)
            return llm.generate([[4] * 9], params, use_tqdm=False)[0].outputs[0]

        plain = list(run(ignore_eos=True).token_ids)
        third = plain[2]
        at = plain.index(third)
        stopped = run(ignore_eos=True, stop_token_ids=[third])
        assert list(stopped.token_ids) == plain[: at + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
        later = run(ignore_eos=True, stop_token_ids=[third], min_tokens=8)
        assert len(later.token_ids) >= 8
        assert third not in list(later.token_ids)[:7]
        ended = run(logit_bias={2: 100.0})
        assert (list(ended.token_ids), ended.finish_reason, ended.stop_reason) == ([2], "stop", None)
        assert run(ignore_eos=True, logit_bias={2: 100.0}).finish_reason == "length"


class TestLogprobs:
    def test_of_the_prompt_and_the_answer_are_those_of_transformers(self, story_llm: LLM, stories: Path) -> None:
        transformers = pytest.importorskip("transformers")
        reference = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
        params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
        (output,) = story_llm.generate("One day, a little girl named Lily", params, use_tqdm=False)
        completion = output.outputs[0]
        ids = [*output.prompt_token_ids, *completion.token_ids]
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], dim=-1)
        assert output.prompt_logprobs[0] is None
        told = [*output.prompt_logprobs[1:], *completion.logprobs]
        for position, found in enumerate(told):
            token = ids[position + 1]
            assert found[token].logprob == pytest.approx(float(expected[position, token]), abs=1e-4)
            best = int(expected[position].argmax())
            assert found[best].rank == 1
            assert found[best].decoded_token == story_llm.get_tokenizer().token_text(best)
        assert all(len(found) in (2, 3) for found in output.prompt_logprobs[1:])
        total = sum(found[token].logprob for found, token in zip(completion.logprobs, completion.token_ids))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)

    def test_of_a_prompt_in_chunks_under_preemption_equal_those_in_one(self, tiny_model: Path) -> None:
        params = SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=1, ignore_eos=True)
        prompts = [[3 + (i * j) % 90 for j in range(60)] for i in range(1, 6)]
        with tiny(tiny_model, max_num_batched_tokens=2048) as whole:
            expected = whole.generate(prompts, params, use_tqdm=False)
        with tiny(tiny_model, max_num_batched_tokens=16, num_gpu_blocks_override=16, max_model_len=128) as chunked:
            found = chunked.generate(prompts, params, use_tqdm=False)
            assert sum(chunked.engine.scheduler.counts.preemptions.values()) > 0
        for one, other in zip(expected, found):
            assert len(one.prompt_logprobs) == 60
            for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:]):
                assert a.keys() == b.keys()
                assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)

    def test_prompt_logprobs_are_whole_even_if_the_prompt_is_cached(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        for _ in range(2):
            (output,) = llm.generate([[8] * 50], params, use_tqdm=False)
            assert all(found is not None for found in output.prompt_logprobs[1:])


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            ([], {}, "prompt is empty"),
            ([96], {}, "token id 96 at index 0 is outside the vocabulary of 96 tokens"),
            ([3, -1], {}, "token id -1 at index 1"),
            ([3, 2**40], {}, "outside the vocabulary"),
            ([[3], 4], {}, "flat list of integers"),
            ([3.5], {}, "flat list of integers"),
            ([5] * 256, {}, "max_model_len=256"),
            ("text", {}, "needs a tokenizer"),
            ({"prompt_tokens": [3]}, {}, "unknown prompt key 'prompt_tokens'"),
            ({}, {}, 'needs "prompt" or "prompt_token_ids"'),
            ([3], {"stop": "x"}, "stop needs a tokenizer"),
            ([3], {"stop_token_ids": [96]}, "96"),
            ([3], {"logit_bias": {96: 1.0}}, "96"),
            ([3], {"n": 17}, "n=17 is more than max_num_seqs=16"),
        ],
        ids=str,
    )
    def test_is_named_and_harms_nobody(self, llm: LLM, prompt: Any, options: dict[str, Any], message: str) -> None:
        good = [[6] * 10]
        expected = ids_of(llm.generate(good, GREEDY, use_tqdm=False))
        llm.engine.add_request("bystander", good[0], GREEDY)
        with pytest.raises(RequestError, match=message.replace("(", r"\(")):
            llm.engine.add_request("bad", prompt, SamplingParams(max_tokens=4, **options))
        outputs = []
        while llm.engine.has_unfinished:
            outputs += llm.engine.step()
        assert list(outputs[-1].outputs[0].token_ids) == expected[0]
        assert_nothing_leaked(llm.engine)

    def test_one_wrong_prompt_of_many_is_named_by_its_index(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="prompt 2: the prompt is empty"):
            llm.generate([[3], [4], []], GREEDY, use_tqdm=False)
        assert_nothing_leaked(llm.engine)

    def test_one_wrong_text_of_many_is_named_by_its_index(self, story_llm: LLM) -> None:
        with pytest.raises(RequestError, match="prompt 2: the prompt must be a string of valid Unicode"):
            story_llm.generate(["Once", {"prompt": "Twice"}, "half a \ud800", "Thrice"], GREEDY, use_tqdm=False)
        with pytest.raises(RequestError, match="prompt 1: unknown prompt key 'promt'"):
            story_llm.generate(["Once", {"prompt": "Twice", "promt": "?"}], GREEDY, use_tqdm=False)
        assert_nothing_leaked(story_llm.engine)

    def test_a_request_that_can_never_fit_is_refused_at_once(self, tiny_model: Path) -> None:
        with tiny(tiny_model, num_gpu_blocks_override=16) as small:
            with pytest.raises(RequestError, match="may need 31 KV blocks") as caught:
                small.generate([[3] * 16], SamplingParams(n=2, max_tokens=240), use_tqdm=False)
            assert caught.value.param == "max_tokens"
            assert_nothing_leaked(small.engine)

    def test_logits_that_are_no_numbers_fail_their_request_alone(self, tiny_model: Path) -> None:
        with tiny(tiny_model) as llm:
            expected = ids_of(llm.generate([[6] * 10], GREEDY, use_tqdm=False))
            model = llm.engine.executor.worker.runner.model
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "embed" in name)[50] = float("nan")
            # token 50 poisons the sequences that contain it; the tied head gives it a NaN logit for everybody
            outputs = llm.generate([[50] * 10, [6] * 10], GREEDY, use_tqdm=False)
            assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
            assert "not finite" in str(outputs[0].outputs[0].stop_reason)
            assert_nothing_leaked(llm.engine)
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "embed" in name)[50] = 0.0
            llm.engine.kv.pool.drop_cache()
            assert len(expected[0]) == 6
            assert llm.generate([[6] * 10], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


class TestStart:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"max_num_seq": 4}, ConfigError, "unknown option max_num_seq=4; did you mean max_num_seqs?"),
            ({"max_num_seqs": 0}, ConfigError, "max_num_seqs must be an integer from 1"),
            ({"block_size": "16"}, ConfigError, "block_size must be an integer"),
            ({"gpu_memory_utilization": 1.5}, ConfigError, "gpu_memory_utilization must be a number"),
            ({"dtype": "int8"}, ConfigError, "dtype='int8' is not one of"),
            ({"tensor_parallel_size": 2}, ConfigError, "tensor_parallel_size=2 is not supported"),
            ({"trust_remote_code": True}, ConfigError, "trust_remote_code=True is not supported"),
            ({"max_model_len": 10_000}, ConfigError, "max_model_len"),
            ({"num_gpu_blocks_override": 3}, CapacityError, "Set max_model_len to at most 48"),
            ({"swap_space": -1}, ConfigError, "swap_space must be a number"),
            ({"load_format": "safetensors"}, ModelError, "safetensors"),
            ({"skip_tokenizer_init": False}, ModelError, "tokenizer"),
        ],
        ids=str,
    )
    def test_a_wrong_option_is_named(
        self, tiny_model: Path, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message.replace("?", r"\?")):
            tiny(tiny_model, **options)

    def test_a_model_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="nothing-here"):
            LLM(str(tmp_path / "nothing-here"))
        for model in (EngineConfig(model="nothing-here"), None):
            with pytest.raises(ConfigError, match=f"not be of type {type(model).__name__}"):
                LLM(model)  # type: ignore[arg-type]

    def test_options_of_other_engines_that_change_nothing_are_taken(self, tiny_model: Path) -> None:
        options = {"tensor_parallel_size": 1, "trust_remote_code": False, "enforce_eager": True, "dtype": "float"}
        with tiny(tiny_model, gpu_memory_utilization=0.1, swap_space=1, **options) as llm:
            assert len(ids_of(llm.generate([[3]], GREEDY, use_tqdm=False))[0]) == 6

    def test_weights_larger_than_the_machine_are_refused_before_they_are_loaded(self, tiny_model: Path) -> None:
        huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200}
        with pytest.raises(CapacityError, match=r"the model's weights take .* GiB in float32"):
            tiny(tiny_model, hf_overrides=huge)

    def test_memory_is_sized_from_the_machine(self, tiny_model: Path) -> None:
        with tiny(tiny_model, max_num_seqs=4, enable_prefix_caching=False) as llm:
            # never more than all rows can fill
            assert llm.engine.memory.num_blocks == 4 * 256 // 16
        with tiny(tiny_model, max_num_seqs=4) as llm:
            assert llm.engine.memory.num_blocks == 4 * CACHED_GENERATIONS * 256 // 16
            plan = llm.engine.memory
            assert plan.kv_bytes + plan.weights_bytes + plan.activation_bytes <= plan.budget_bytes


def test_default_parameters_come_from_generation_config(tiny_model: Path) -> None:
    (tiny_model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "do_sample": True}))
    with tiny(tiny_model) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k) == (0.6, 20)


class TestInterrupts:
    """Ctrl-C in the middle of steps, as it comes in a notebook; and steps that fail."""

    def press(self, monkeypatch: pytest.MonkeyPatch, llm: LLM, at: int, times: int = 1) -> None:
        """Ctrl-C while step `at` runs in the executor, `times` times."""
        submit, num_steps = llm.engine.executor.submit, 0

        def pressed(step: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            for _ in range(times if num_steps == at else 0):
                signal.raise_signal(signal.SIGINT)
            return submit(step)

        monkeypatch.setattr(llm.engine.executor, "submit", pressed)

    @pytest.mark.parametrize("steps_in_flight", [1, 2])
    @pytest.mark.parametrize("at", [1, 3, 6])
    def test_ctrl_c_aborts_all_and_the_next_call_is_answered(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, steps_in_flight: int, at: int
    ) -> None:
        with tiny(tiny_model, max_steps_in_flight=steps_in_flight) as llm:
            expected = ids_of(llm.generate([[3, 4, 5]] * 2, GREEDY, use_tqdm=False))
            with monkeypatch.context() as patch:
                self.press(patch, llm, at)
                with pytest.raises(KeyboardInterrupt):
                    llm.generate([[3, 4, 5]] * 2, GREEDY, use_tqdm=False)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert not llm.engine.has_unfinished
            assert ids_of(llm.generate([[3, 4, 5]] * 2, GREEDY, use_tqdm=False)) == expected
            assert_nothing_leaked(llm.engine)

    def test_ctrl_c_while_prompts_are_read(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with tiny(tiny_model) as llm:
            add, num_added = llm.engine.scheduler.add, 0

            def pressed(group: Any) -> None:
                nonlocal num_added
                num_added += 1
                if num_added == 3:
                    signal.raise_signal(signal.SIGINT)
                add(group)

            monkeypatch.setattr(llm.engine.scheduler, "add", pressed)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[3, 4, 5]] * 9, GREEDY, use_tqdm=False)
            assert num_added == 3 and not llm.engine.has_unfinished
            assert len(llm.generate([[3, 4, 5]] * 2, GREEDY, use_tqdm=False)) == 2
            assert_nothing_leaked(llm.engine)

    def test_ctrl_c_twice_does_not_wait(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with tiny(tiny_model) as llm:
            self.press(monkeypatch, llm, 2, times=2)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[3, 4, 5]], GREEDY, use_tqdm=False)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
                llm.generate([[3, 4, 5]], GREEDY, use_tqdm=False)

    @pytest.mark.parametrize("steps_in_flight", [1, 2])
    def test_a_step_that_fails_ends_the_engine(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, steps_in_flight: int
    ) -> None:
        with tiny(tiny_model, max_steps_in_flight=steps_in_flight) as llm:

            def fail(step: Any) -> None:
                raise RuntimeError("out of something")

            monkeypatch.setattr(llm.engine.executor.worker.runner, "forward", fail)
            monkeypatch.setattr(llm.engine.scheduler, "abort", fail)  # whose plans are half done
            with pytest.raises(RuntimeError, match="out of something") as raised:
                llm.generate([[3, 4, 5]] * 3, GREEDY, use_tqdm=False)
            assert raised.value.__context__ is None, "nothing else went wrong on the way out"
            assert not llm.engine.has_unfinished
            with pytest.raises(EngineDeadError, match="RuntimeError: out of something"):
                llm.generate([[3, 4, 5]], GREEDY, use_tqdm=False)
            with pytest.raises(EngineDeadError):
                llm.engine.step()
            with pytest.raises(EngineDeadError):
                llm.engine.add_request("another", [3], GREEDY)


def test_collections_walk_through_what_is_new_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, frozen = llm.engine.step, []

    def counting() -> Any:
        frozen.append(gc.get_freeze_count())
        if len(frozen) > 8:
            raise KeyboardInterrupt
        return step()

    before = gc.get_freeze_count()
    monkeypatch.setattr(llm.engine, "step", counting)
    llm.generate([[3, 4]], GREEDY, use_tqdm=False)
    assert min(frozen) > before + 10_000 and gc.get_freeze_count() == 0
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[3, 4]] * 9, GREEDY, use_tqdm=False)
    assert gc.get_freeze_count() == 0
