"""Options of a command line, made from the fields of dataclasses: the engine's, those of sampling, and others' (`add_option`).

A new field of `EngineConfig` or `SamplingParams` is an option as soon as `ENGINE_HELP` or `SAMPLING_HELP` explains it. Words
become values here; the classes themselves check them. Loads no torch, and knows no command.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn, get_args, get_type_hints

from quire import config
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams

ENGINE_HELP = {
    "model": "a directory in Hugging Face's form, or a hub name",
    "tokenizer": "directory of the tokenizer, where it isn't the model's",
    "skip_tokenizer_init": "load no tokenizer: prompts are token ids, and so are answers",
    "revision": "branch, tag or commit of a hub model",
    "hf_overrides": "JSON object whose values replace those in the model's config.json",
    "load_format": "where weights come from; dummy draws random ones and needs a config.json alone",
    "dtype": "of weights and activations; auto is what the model's config says",
    "kv_cache_dtype": "of keys and values in the cache; auto is the same as --dtype",
    "seed": "of random draws: the same seed gives the same answers to the same requests; also of dummy weights",
    "device": "auto takes a GPU if there is one",
    "attention_backend": "auto takes the fastest that can do it; reference is slow, plain torch",
    "max_model_len": "most tokens of a sequence, prompt and answer together (default: the model's limit)",
    "max_num_seqs": "most sequences that run at once",
    "max_num_batched_tokens": "token budget of one step (default: 2048, on a GPU 8192; or --max-num-seqs if that is more)",
    "max_steps_in_flight": "steps planned before the first has come back (default: 1 on a CPU, 2 on a GPU)",
    "step_target_ms": "milliseconds that a step with decoding requests may take: long prompts are read in chunks that fit "
    "(default: any time)",
    "client_weights": 'JSON object: names of API keys, and how much token time each gets beside the others: {"key-1": 2}',
    "max_logprobs": "most alternatives that a request may ask to see at each position",
    "block_size": "tokens in a block of the KV cache",
    "gpu_memory_utilization": "share of the memory that weights, activations and KV cache may take together "
    "(default: 0.9 of a GPU's, 0.4 of what a CPU's machine has available)",
    "num_gpu_blocks_override": "have so many KV blocks instead of as many as fit, on a CPU too",
    "swap_space": "GiB of host memory for the KV blocks of preempted sequences",
    "preemption_mode": "what to do with the KV blocks of a request that must make room: swap or recompute; forks swaps what "
    "has several sequences and recomputes the rest, auto does what takes less time, by the measured rates",
    "enable_prefix_caching": "keep the blocks of finished sequences for later prompts that begin alike",
    "enforce_eager": "use no graphs; on a CPU there are none",
    "num_threads": "threads of a CPU's kernels (default: one for each core, or one in all for a model of a few megabytes)",
}
ENGINE_CHOICES = {
    "load_format": config.LOAD_FORMATS,
    "dtype": config.DTYPES,
    "kv_cache_dtype": config.DTYPES,
    "device": config.DEVICES,
    "preemption_mode": config.PREEMPTION_MODES,
    "attention_backend": config.ATTENTION_BACKENDS,
}
SAMPLING_HELP = {
    "n": "answers to each prompt",
    "best_of": "answers to make, of which the --n likeliest are given; with --use-beam-search, its width",
    "use_beam_search": "keep the --best-of (or --n) likeliest answers at each token, instead of drawing",
    "length_penalty": "of a beam search: an answer's log probability is divided by its length to this power",
    "early_stopping": "of a beam search: yes ends it when as many answers are finished as it is wide, no when a better one "
    "is unlikely, never when none is possible",
    "temperature": "0 takes the likeliest token each time; higher is more random",
    "top_p": "draw from the fewest likeliest tokens whose probabilities sum up to this",
    "top_k": "draw from this many likeliest tokens; 0 is all",
    "min_p": "draw from tokens at least this probable, relative to the likeliest",
    "max_tokens": "most tokens of an answer; none is up to the model's limit",
    "min_tokens": "no end of any kind before so many tokens",
    "stop": "text that ends an answer and is cut off; may be given several times",
    "stop_token_ids": "tokens that end an answer, as in 1,2,3",
    "include_stop_str_in_output": "leave the stop text in the answer",
    "ignore_eos": "go on after the end-of-sequence token",
    "presence_penalty": "lower the logits of tokens that are in the answer already, once; -2 to 2",
    "frequency_penalty": "lower the logits of tokens in the answer by how often they are there; -2 to 2",
    "repetition_penalty": "divide the logits of tokens in prompt or answer by this; 1 is off",
    "logprobs": "tell log probabilities: the token's own and this many of the likeliest; -1 is all",
    "prompt_logprobs": "the same for the prompt's tokens",
    "logit_bias": 'JSON object of token ids and what to add to their logits: {"42": -100}',
    "allowed_token_ids": "draw no tokens but these, as in 1,2,3",
    "bad_words": "text that an answer must not contain; may be given several times",
    "truncate_prompt_tokens": "keep this many tokens of a longer prompt, the last ones",
    "detokenize": "turn answers into text",
    "skip_special_tokens": "leave special tokens out of the text",
    "spaces_between_special_tokens": "put spaces between special tokens in the text",
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a mistake, and names the option that an unknown one was meant to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # what abbreviates one option today may be two tomorrow
        self.add_argument("--debug", action="store_true", help="show tracebacks (or set QUIRE_DEBUG=1)")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(found, "parser", self)
            option = unknown[0].split("=")[0]
            known = re.findall(r"--[a-z][a-z-]*", parser.format_help())
            close = difflib.get_close_matches(option, known, n=1) if option.startswith("--") else []
            parser.error(f"unknown option {option}" + (f"; did you mean {close[0]}?" if close else ""))
        return found


def add_engine_arguments(parser: argparse.ArgumentParser, *, model_required: bool = True) -> None:
    """Adds an option for each field of EngineConfig."""
    group = parser.add_argument_group("engine")
    types = get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        is_required = model_required and field.default is dataclasses.MISSING
        add_option(
            group,
            field.name,
            types[field.name],
            ENGINE_HELP.get(field.name, ""),
            choices=ENGINE_CHOICES.get(field.name),
            required=is_required,
            default=None if field.default is dataclasses.MISSING else field.default,
        )


def engine_config_from(args: argparse.Namespace, **instead: Any) -> EngineConfig:
    """The options given, and `instead` of some of them. Raises ConfigError for a value out of range."""
    names = (field.name for field in dataclasses.fields(EngineConfig))
    return EngineConfig.from_options(**{name: getattr(args, name) for name in names} | instead)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of SamplingParams that a user may want. The engine's --seed serves for sampling too."""
    group = parser.add_argument_group(
        "sampling", "What is not given is as the model recommends (generation_config.json), or as told in brackets."
    )
    types = get_type_hints(SamplingParams)
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name, text in SAMPLING_HELP.items():
        add_option(group, name, types[name], text, shown_default=defaults[name], default=argparse.SUPPRESS)


def sampling_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names of SamplingParams' fields."""
    return {name: getattr(args, name) for name in SAMPLING_HELP if hasattr(args, name)}


def parse_sampling_setting(name: str, value: str) -> dict[str, Any]:
    """One sampling option, as a chat's /set gives it: ("temperature", "0.5"). Raises ConfigError or RequestError."""
    if name not in SAMPLING_HELP:
        close = difflib.get_close_matches(name, SAMPLING_HELP, n=1)
        raise ConfigError(f"there is no parameter {name}" + (f"; did you mean {close[0]}?" if close else ""))
    parser = Parser(prog="/set")
    add_sampling_arguments(parser)
    flag = name.replace("_", "-")
    is_switch = get_type_hints(SamplingParams)[name] is bool
    if is_switch and value not in ("yes", "no"):
        raise ConfigError(f"{name} is yes or no, not {value!r}")
    words = [f"--{flag}" if value == "yes" else f"--no-{flag}"] if is_switch else [f"--{flag}={value}"]
    options = sampling_options_from(parser.parse_args(words))
    SamplingParams(**options)
    return options


def add_option(
    group: argparse._ArgumentGroup,
    name: str,
    hint: Any,
    text: str,
    *,
    default: Any,
    shown_default: Any = None,
    choices: Sequence[str] | None = None,
    required: bool = False,
) -> None:
    """An option for a field. `hint` is its type; `default` what the parser gives, `shown_default` what the help tells, if that
    differs."""
    flag = "--" + name.replace("_", "-")
    shown = default if shown_default is None else shown_default
    if shown not in (None, argparse.SUPPRESS) and not isinstance(shown, bool):
        text += f" (default: {shown})"
    text = text.replace("%", "%%")
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if bool in kinds and str in kinds:
        words = {"yes": True, "no": False, "never": "never"}
        group.add_argument(
            flag, type=functools.partial(_one_of, words), default=default, help=text, metavar="{yes,no,never}"
        )
    elif bool in kinds:
        note = f" (default: {'yes' if shown else 'no'})"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text + note)
    elif Sequence[str] in kinds:
        group.add_argument(flag, action="append", default=default, help=text, metavar="TEXT")
    elif Sequence[int] in kinds:
        group.add_argument(flag, type=_token_ids, default=default, help=text, metavar="IDS")
    elif any(issubclass(getattr(kind, "__origin__", object), Mapping) for kind in kinds):
        group.add_argument(flag, type=_json_object, default=default, help=text, metavar="JSON")
    else:
        (kind,) = (kind for kind in kinds if kind is not type(None))
        # the values are checked where the option is: one message, however the option came
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "NAME")
        convert = functools.partial(_or_none, kind) if type(None) in kinds else kind
        group.add_argument(flag, type=convert, default=default, help=text, metavar=metavar, required=required)


def _one_of(words: Mapping[str, Any], text: str) -> Any:
    if text not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
    return words[text]


def _or_none(kind: Callable[[str], Any], text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids like 1,2,3") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
