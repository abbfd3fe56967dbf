"""What a request may ask of sampling: names, defaults and meanings are those that vLLM's users know.

Every value is checked here, once, for type, range and length, so nothing behind this module checks again. It does not know
the model: token ids are compared with the vocabulary by `SamplingParams.verify`, when the model is known. No torch.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quire.errors import RequestError

# Below this a temperature means "greedy", as in vLLM.
GREEDY_EPSILON = 1e-5
# Caps that keep one request from costing the others their memory or time; all far above what clients send.
MAX_N = 128
MAX_BEAM_WIDTH = 128
MAX_TEMPERATURE = 100.0
MAX_LENGTH_PENALTY = 10.0  # its power of a length still fits float32
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_STOP_STRINGS = 128
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_ENTRIES = 4096
MAX_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROBS = 1 << 20
MAX_TOKENS = (1 << 31) - 1


class RequestOutputKind(enum.Enum):
    """What a stream of `RequestOutput`s carries."""

    CUMULATIVE = 0  # every output holds all tokens so far
    DELTA = 1  # every output holds only the new tokens
    FINAL_ONLY = 2  # one output, at the end


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when to stop. Immutable; lists are kept as tuples.

    n: completions per prompt. best_of: sequences to make, of which the n likeliest are returned (None: n).
    use_beam_search: best_of (or n) is the width of a beam search; see `BeamSearchParams` for length_penalty and
    early_stopping. Nothing is drawn then, so temperature, top_p, top_k and min_p must be left alone.
    presence_penalty, frequency_penalty: subtracted from logits of tokens already in the output, [-2, 2].
    repetition_penalty: divides (multiplies, if negative) the logits of tokens in prompt or output; 1 is off.
    temperature: 0 is greedy. top_p (0, 1]; top_k 0 or -1 is off; min_p [0, 1], relative to the likeliest token.
    seed: makes draws reproducible, whatever else is in the batch; None (or -1) lets the engine choose.
    stop, stop_token_ids: end of a completion, cut from the text unless include_stop_str_in_output.
    ignore_eos: go on after the end-of-sequence token. min_tokens: no eos, stop token or stop string before so many tokens.
    max_tokens: at most so many new tokens; None is up to the model's length.
    logprobs, prompt_logprobs: how many top alternatives to report beside the token itself; -1 is the whole vocabulary.
    logit_bias: token id -> [-100, 100], added to the logits. allowed_token_ids: nothing else may be drawn.
    bad_words: strings that must not be completed. truncate_prompt_tokens: keep the last so many prompt tokens (-1: as
    many as fit the model).

    Raises RequestError (param = the field's name) for anything out of range.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        keep = _Keeper(self)
        keep.integer("n", 1, MAX_N)
        keep.integer("best_of", 1, MAX_N, optional=True)
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of must be at least n ({self.n}), got {self.best_of}", param="best_of")
        keep.number("presence_penalty", -2.0, 2.0)
        keep.number("frequency_penalty", -2.0, 2.0)
        keep.number("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        keep.number("temperature", 0.0, MAX_TEMPERATURE)
        keep.number("top_p", 0.0, 1.0, above=True)
        keep.integer("top_k", -1, MAX_TOKENS)
        keep.number("min_p", 0.0, 1.0)
        keep.integer("seed", -(1 << 63), (1 << 64) - 1, optional=True)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        keep.strings("stop", MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS, one_allowed=True)
        keep.token_ids("stop_token_ids", MAX_STOP_TOKEN_IDS)
        keep.boolean("include_stop_str_in_output")
        keep.boolean("ignore_eos")
        keep.integer("max_tokens", 1, MAX_TOKENS, optional=True)
        keep.integer("min_tokens", 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", param="min_tokens"
            )
        keep.integer("logprobs", -1, MAX_LOGPROBS, optional=True)
        keep.integer("prompt_logprobs", -1, MAX_LOGPROBS, optional=True)
        keep.boolean("detokenize")
        if not self.detokenize and self.stop:
            raise RequestError("stop strings are found in text: they need detokenize=True", param="stop")
        keep.boolean("skip_special_tokens")
        keep.boolean("spaces_between_special_tokens")
        keep.logit_bias()
        keep.token_ids("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids must be left out or name at least one token, got []", param="allowed_token_ids"
            )
        keep.strings("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        keep.integer("truncate_prompt_tokens", -1, MAX_TOKENS, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be -1 (as many as fit) or at least 1, got 0",
                param="truncate_prompt_tokens",
            )
        keep.boolean("use_beam_search")
        keep.beam_scoring()
        self._check_beam_search()
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(
                f"output_kind must be a RequestOutputKind, got {_shown(self.output_kind)}", param="output_kind"
            )

    def _check_beam_search(self) -> None:
        if self.use_beam_search:
            if (not self.is_greedy and (self.temperature, self.top_p, self.min_p) != (1.0, 1.0, 0.0)) or self.top_k > 0:
                raise RequestError(
                    "beam search draws nothing: leave temperature, top_p, top_k and min_p at their defaults",
                    param="temperature",
                )
            if self.prompt_logprobs is not None:
                raise RequestError("beam search has no prompt_logprobs", param="prompt_logprobs")
        elif self.length_penalty != 1.0 or self.early_stopping is not False:
            name = "length_penalty" if self.length_penalty != 1.0 else "early_stopping"
            raise RequestError(f"{name} is for beam search: set use_beam_search", param=name)
        elif self.num_sequences > self.n and self.output_kind is RequestOutputKind.DELTA:
            raise RequestError("best_of above n cannot be streamed: the best are known at the end", param="best_of")

    def verify(self, *, vocab_size: int, max_model_len: int | None = None, max_logprobs: int = 20) -> None:
        """Check what only the model can tell: token ids, and lengths. max_logprobs is the server's cap, -1 for none.

        Raises RequestError naming the field. max_tokens may exceed max_model_len, as in vLLM: the length just ends it.
        """
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
        ):
            beyond = [token_id for token_id in ids or () if token_id >= vocab_size]
            if beyond:
                raise RequestError(
                    f"{name} must hold token ids in [0, {vocab_size - 1}], got {_shown(beyond[:5])}", param=name
                )
        for name in ("logprobs", "prompt_logprobs"):
            asked: int | None = getattr(self, name)
            if asked is not None and max_logprobs != -1 and (asked == -1 or asked > max_logprobs):
                raise RequestError(
                    f"{name} must be at most {max_logprobs} (the server's max_logprobs), got {asked}", param=name
                )
        if max_model_len is not None and self.min_tokens >= max_model_len:
            raise RequestError(
                f"min_tokens must be below the model's length {max_model_len}, got {self.min_tokens}",
                param="min_tokens",
            )

    @property
    def num_sequences(self) -> int:
        """Sequences that a request runs at once: best_of, or n. A beam search's width."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        """No draw: the likeliest token. top_k, top_p and min_p then have no effect."""
        return self.temperature < GREEDY_EPSILON

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if there are none."""
        assert not isinstance(self.stop, str)
        return tuple(self.stop or ())

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def all_stop_token_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """Tokens that end this request, for a model whose end-of-sequence tokens are `eos_token_ids`."""
        return frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))


def recommended_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that a model's generation_config.json recommends, by the names of SamplingParams' fields."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: generation[name] for name in names if generation.get(name) is not None}


def over_recommended(recommended: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for over what the model recommends. A beam search draws nothing: of that it takes the penalty alone."""
    if asked.get("use_beam_search"):
        recommended = {name: value for name, value in recommended.items() if name == "repetition_penalty"}
    return {**recommended, **asked}


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` likeliest continuations of a prompt, with transformers' semantics.

    A finished beam scores cumulative_logprob / length ** length_penalty, its length in tokens of the answer, the end token
    included. The search ends
        early_stopping True     as soon as beam_width beams are finished
        early_stopping False    when the best running beam, at its present length, scores no better than the worst of them
        early_stopping "never"  when it could not even at max_tokens (with a length_penalty above 0)
    n: how many of the beams are returned (None: all). The other parameters mean what they mean in `SamplingParams`; they
    change log probabilities, as transformers' processors do. temperature is vLLM's and must be 0 or 1: nothing is drawn.
    Raises RequestError for anything out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False
    n: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        keep = _Keeper(self)
        keep.integer("beam_width", 1, MAX_BEAM_WIDTH)
        keep.integer("max_tokens", 1, MAX_TOKENS)
        keep.integer("n", 1, self.beam_width, optional=True)
        keep.number("temperature", 0.0, MAX_TEMPERATURE)
        if self.temperature not in (0.0, 1.0):
            raise RequestError("beam search draws nothing: temperature must be 0 or 1", param="temperature")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The same request as `SamplingParams`, which check the rest."""
        own = ("beam_width", "temperature", "n")
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}
        n = self.beam_width if self.n is None else self.n
        return SamplingParams(n=n, best_of=self.beam_width, use_beam_search=True, temperature=0.0, **shared)


class _Keeper:
    """Checks one field of frozen params and stores it in one form (ints as int, numbers as float, lists as tuple).

    Integers and numbers of other libraries (NumPy's scalars) are taken; bool is not a number here, nor a number a bool:
    `temperature=True` is a mistake of the caller.
    """

    def __init__(self, params: SamplingParams | BeamSearchParams) -> None:
        self._params = params

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self._params, name, value)

    def boolean(self, name: str) -> None:
        value = getattr(self._params, name)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, got {_shown(value)}", param=name)

    def integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self._params, name)
        if value is None and optional:
            return
        if not _is_integer(value) or not low <= value <= high:
            also = " or None" if optional else ""
            raise RequestError(f"{name} must be an integer in [{low}, {high}]{also}, got {_shown(value)}", param=name)
        self._store(name, int(value))

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        """`above`: the low end itself is excluded."""
        value = getattr(self._params, name)
        if not _is_number(value) or not (low < value if above else low <= value) or value > high:
            allowed = f"{'(' if above else '['}{low:g}, {high:g}]"
            raise RequestError(f"{name} must be a finite number in {allowed}, got {_shown(value)}", param=name)
        self._store(name, float(value))

    def beam_scoring(self) -> None:
        self.number("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        value = getattr(self._params, "early_stopping")  # noqa: B009 - the union has no such attribute
        if not (isinstance(value, bool) or value == "never"):
            raise RequestError(
                f'early_stopping must be true, false or "never", got {_shown(value)}', param="early_stopping"
            )

    def strings(self, name: str, max_count: int, max_chars: int, *, one_allowed: bool = False) -> None:
        value = getattr(self._params, name)
        if isinstance(value, str) and one_allowed:
            value = (value,)
        value = self._sequence(name, value, max_count, "strings")
        for text in value:
            if not isinstance(text, str) or not 1 <= len(text) <= max_chars:
                raise RequestError(
                    f"{name} must hold strings of 1 to {max_chars} characters, got {_shown(text)}", param=name
                )
        self._store(name, value)

    def token_ids(self, name: str, max_count: int) -> None:
        value = getattr(self._params, name)
        if value is None:
            return
        value = self._sequence(name, value, max_count, "token ids")
        for token_id in value:
            if not _is_integer(token_id) or not 0 <= token_id <= MAX_TOKENS:
                raise RequestError(f"{name} must hold token ids of 0 or more, got {_shown(token_id)}", param=name)
        self._store(name, tuple(int(token_id) for token_id in value))

    def _sequence(self, name: str, value: Any, max_count: int, of_what: str) -> tuple[Any, ...]:
        if value is None:
            return ()
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, set, frozenset)):
            raise RequestError(f"{name} must be a list of {of_what}, got {_shown(value)}", param=name)
        if len(value) > max_count:
            raise RequestError(f"{name} must hold at most {max_count} {of_what}, got {len(value)}", param=name)
        return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)

    def logit_bias(self) -> None:
        value = getattr(self._params, "logit_bias")  # noqa: B009 - the union has no such attribute
        if value is None:
            return
        if not isinstance(value, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {_shown(value)}", param="logit_bias")
        if len(value) > MAX_LOGIT_BIAS_ENTRIES:
            raise RequestError(
                f"logit_bias must hold at most {MAX_LOGIT_BIAS_ENTRIES} entries, got {len(value)}", param="logit_bias"
            )
        kept: dict[int, float] = {}
        for key, bias in value.items():
            # JSON has only string keys, so OpenAI's clients send {"50256": -100}.
            token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
            if not _is_integer(token_id) or not 0 <= token_id <= MAX_TOKENS:
                raise RequestError(
                    f"logit_bias must have token ids of 0 or more as keys, got {_shown(key)}", param="logit_bias"
                )
            if not _is_number(bias) or abs(bias) > MAX_LOGIT_BIAS:
                raise RequestError(
                    f"logit_bias must have values in [{-MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}], "
                    f"got {_shown(bias)} for token {_shown(key)}",
                    param="logit_bias",
                )
            kept[int(token_id)] = float(bias)
        self._store("logit_bias", kept)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite real number. An int too large for a float counts as not finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """repr, cut short: an error message must not echo a megabyte back."""
    try:
        text = repr(value)
    except Exception:
        # An int of more than 4,300 digits refuses to be printed.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
