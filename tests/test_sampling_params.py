"""Every field of SamplingParams is checked, and says which one is wrong."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from quire import sampling_params as module
from quire.errors import RequestError
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert (params.repetition_penalty, params.stop_strings, params.detokenize) == (1.0, (), True)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert not params.is_greedy
    assert not params.uses_penalties


NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
INTEGERS = ("n", "best_of", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
INTEGERS += ("truncate_prompt_tokens",)
BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
BOOLEANS += ("spaces_between_special_tokens",)
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")
HUGE = 10**5000  # too large for a float, and to be printed

BAD = [
    *((name, value) for name in NUMBERS for value in (None, True, "1", math.nan, math.inf, -math.inf, HUGE, [1.0], 1j)),
    *((name, value) for name in INTEGERS for value in (True, "1", 1.0, math.nan, HUGE, -HUGE, [1])),
    *((name, value) for name in BOOLEANS for value in (None, 1, "true")),
    *((name, value) for name in LISTS for value in (3, {"a": 1}, b"x", [None], [1.5], [True], [[]])),
    *[("n", 0), ("n", None), ("n", module.MAX_N + 1), ("best_of", 0), ("top_k", -2), ("top_k", None)],
    *[("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0), ("temperature", -0.1)],
    *[("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**64), ("max_tokens", 0)],
    *[("min_tokens", -1), ("min_tokens", 17), ("logprobs", -2), ("prompt_logprobs", -2), ("truncate_prompt_tokens", 0)],
    *[("truncate_prompt_tokens", -2), ("stop", ""), ("stop", ["a", ""]), ("stop", "x" * 1025), ("stop", ["a"] * 129)],
    *[("stop_token_ids", "12"), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 1025), ("allowed_token_ids", [])],
    *[("bad_words", "word"), ("bad_words", [""]), ("bad_words", ["x"] * 1025), ("output_kind", 1), ("logit_bias", [1])],
    *[
        ("logit_bias", value)
        for value in ({-1: 1}, {"x": 1}, {1: None}, {1: 100.1}, {1: math.nan}, {True: 1}, {1.5: 1})
    ],
    ("logit_bias", dict.fromkeys(range(4097), 1.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_other_libraries_send_is_kept_in_one_form():
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), top_p=1, stop="END", stop_token_ids=[np.int32(3)],
        logit_bias={"7": -100, np.int64(8): 5}, seed=-1, best_of=2, allowed_token_ids={9, 4},
    )  # fmt: skip
    assert [type(value) for value in (params.n, params.temperature, params.top_p)] == [int, float, float]
    assert (params.stop_strings, params.stop_token_ids, params.allowed_token_ids) == (("END",), (3,), (4, 9))
    assert params.logit_bias == {7: -100.0, 8: 5.0}
    assert params.seed is None
    assert SamplingParams(temperature=1e-6).is_greedy
    assert SamplingParams(frequency_penalty=0.1).uses_penalties


def test_immutable_and_strict_about_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    assert dataclasses.replace(SamplingParams(stop="a"), n=3).stop_strings == ("a",)
    stops = ["a"]
    params = SamplingParams(stop=stops)
    stops.append("b")
    assert params.stop_strings == ("a",)


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(detokenize=False, stop="x")


def test_verify_knows_the_model():
    for name, value in (("stop_token_ids", [10]), ("logit_bias", {10: 1.0}), ("allowed_token_ids", [3, 10])):
        params = SamplingParams(**{name: value})
        params.verify(vocab_size=11)
        with pytest.raises(RequestError) as caught:
            params.verify(vocab_size=10)
        assert caught.value.param == name
    for name in ("logprobs", "prompt_logprobs"):
        SamplingParams(**{name: 20}).verify(vocab_size=100)
        SamplingParams(**{name: -1}).verify(vocab_size=100, max_logprobs=-1)
        for value in (21, -1):
            with pytest.raises(RequestError) as caught:
                SamplingParams(**{name: value}).verify(vocab_size=100)
            assert caught.value.param == name
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=50, max_tokens=None).verify(vocab_size=10, max_model_len=50)


def test_all_stop_token_ids():
    assert SamplingParams(stop_token_ids=[5]).all_stop_token_ids([2, 3]) == {2, 3, 5}
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).all_stop_token_ids([2]) == {5}


@pytest.mark.parametrize(
    ("name", "value"), [("beam_width", 0), ("beam_width", 129), ("max_tokens", None), ("length_penalty", math.nan)]
)
def test_beam_search_params(name, value):
    assert BeamSearchParams(beam_width=4, max_tokens=8).length_penalty == 1.0
    with pytest.raises(RequestError) as caught:
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8} | {name: value}))
    assert caught.value.param == name


def test_outputs_hold_what_a_client_reads():
    completion = CompletionOutput(index=0, text="a", token_ids=[1], logprobs=[{1: Logprob(-0.5, 1, "a")}])
    assert not completion.finished()
    completion.finish_reason = "stop"
    assert completion.finished()
    output = RequestOutput("id", "p", [1, 2], outputs=[completion], metrics=RequestMetrics(arrival_time=1.0))
    assert output.metrics is not None
    assert output.metrics.time_in_queue is None
    output.metrics.first_scheduled_time = 3.0
    assert output.metrics.time_in_queue == 2.0


def test_no_torch():
    names = "quire.sampling_params, quire.outputs, quire.engine.tokenizer, quire.engine.detokenizer"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_beam_search_is_asked_for_as_sampling_parameters_are():
    found = module.BeamSearchParams(beam_width=4, max_tokens=9, n=2, length_penalty=2, early_stopping="never")
    params = found.sampling_params()
    assert (params.n, params.num_sequences, params.use_beam_search, params.is_greedy) == (2, 4, True, True)
    assert (params.length_penalty, params.early_stopping, params.max_tokens) == (2.0, "never", 9)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "n": 2, "output_kind": module.RequestOutputKind.DELTA}, "best_of"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": True, "length_penalty": 11.0}, "length_penalty"),
        ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
        ({"use_beam_search": True, "top_k": 5}, "temperature"),
        ({"use_beam_search": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_does_not_go_with_a_beam_search_or_without_one_is_refused(params, name):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert caught.value.param == name
