"""Options from dataclasses: one for each field, with its default, and words become its values."""

import dataclasses

import pytest

from quire import options
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams

# Those of SamplingParams that are no options: the engine's seed serves, and the job decides.
NO_OPTIONS = {"seed", "output_kind"}


def parse(*argv):
    parser = options.Parser(prog="test")
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser)
    return parser.parse_args(argv)


def test_every_field_is_explained():
    assert options.ENGINE_HELP.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
    assert options.SAMPLING_HELP.keys() == {field.name for field in dataclasses.fields(SamplingParams)} - NO_OPTIONS


def test_defaults_are_the_dataclasses():
    args = parse("--model", "m")
    assert options.engine_config_from(args) == EngineConfig(model="m")
    assert options.sampling_options_from(args) == {}


def test_a_command_may_set_other_defaults():
    parser = options.Parser(prog="test")
    options.add_engine_arguments(parser)
    parser.set_defaults(load_format="dummy")
    assert options.engine_config_from(parser.parse_args(["--model", "m"])).load_format == "dummy"


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max-num-seqs", "3"], "max_num_seqs", 3),
        (["--max-model-len=none"], "max_model_len", None),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--skip-tokenizer-init"], "skip_tokenizer_init", True),
        (["--dtype", "bf16"], "dtype", "bfloat16"),
        (["--hf-overrides", '{"num_hidden_layers": 2}'], "hf_overrides", {"num_hidden_layers": 2}),
        (["--seed", "7"], "seed", 7),
    ],
)
def test_engine_option(argv, name, value):
    assert getattr(options.engine_config_from(parse("--model", "m", *argv)), name) == value


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--temperature", "0.5"], "temperature", 0.5),
        (["--stop", "a", "--stop", "\n"], "stop", ("a", "\n")),
        (["--stop-token-ids", "1,2"], "stop_token_ids", (1, 2)),
        (["--max-tokens", "none"], "max_tokens", None),
        (["--ignore-eos"], "ignore_eos", True),
        (["--logit-bias", '{"5": -1}'], "logit_bias", {5: -1.0}),
        (["--top-k", "-1"], "top_k", -1),
    ],
)
def test_sampling_option(argv, name, value):
    defaults = SamplingParams(temperature=0.25)
    given = options.sampling_options_from(parse("--model", "m", *argv))
    assert dataclasses.replace(defaults, **given) == dataclasses.replace(defaults, **{name: value})


def test_beam_search_options():
    args = parse(
        "--model", "m", "--use-beam-search", "--best-of", "4", "--early-stopping", "never", "--length-penalty=2"
    )
    expected = SamplingParams(use_beam_search=True, best_of=4, early_stopping="never", length_penalty=2.0)
    assert SamplingParams(**options.sampling_options_from(args)) == expected
    for word, value in (("yes", True), ("no", False)):
        assert options.sampling_options_from(parse("--model", "m", "--early-stopping", word)) == {
            "early_stopping": value
        }
