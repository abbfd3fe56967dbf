"""What requests may hold: names and types, by OpenAI's API and the extras that vLLM's users send.

A field is acted on, or refused with a 400 that names it (`NOT_YET`), or stands in NO_EFFECT: accepted, documented, and
without effect. A field that is none of these is unknown, and refused too. Ranges are checked by `SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from quire.server.errors import ApiError, not_supported

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]

# Accepted and without effect: who sends them loses nothing but what a service of OpenAI's size would do with them.
NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",  # prefixes are found without a hint
        "prompt_cache_retention",
        "verbosity",
        "prediction",  # a hint for speed
        "spaces_between_special_tokens",  # the tokenizers library puts none
        "stream_options.include_obfuscation",
        "tools.function.strict",  # arguments are what the model writes
    }
)

# Field -> the values that ask for nothing. Anything else is refused.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


class Strict(BaseModel):
    """No unknown fields, no "5" for 5."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str


class FunctionName(Strict):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(FunctionName):
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates print it: what models have been trained on, in that order."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], Field(max_length=128)]


class SamplingRequest(Strict):
    """How tokens are drawn, and when to stop. None, or no value, is the model's default, the parent's in a fork, or the
    server's."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    # Fields of the request that are fields of SamplingParams, by the same name.
    SAMPLING: ClassVar[tuple[str, ...]] = (
        *("n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "include_stop_str_in_output", "logit_bias"),
        *("allowed_token_ids", "bad_words", "skip_special_tokens", "spaces_between_special_tokens"),
    )

    def sampling_options(self) -> dict[str, Any]:
        """What was given of SamplingParams."""
        return {name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None}

    def refuse_what_is_missing(self) -> None:
        """Raises ApiError for the first field that asks for what Quire cannot do, or cannot yet."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for streams: set stream to true", param="stream_options")

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class GenerationRequest(SamplingRequest):
    """What /v1/completions and /v1/chat/completions share."""

    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(gt=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(max_length=200)] | None = None

    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    SAMPLING: ClassVar[tuple[str, ...]] = (
        *SamplingRequest.SAMPLING,
        *("best_of", "use_beam_search", "length_penalty", "early_stopping", "prompt_logprobs"),
    )

    def refuse_what_is_missing(self) -> None:
        super().refuse_what_is_missing()
        for name, harmless in NOT_YET.items():
            value = getattr(self, name, None)
            if value is not None and value not in harmless:
                raise not_supported(name, name)
        if self.response_format is not None and self.response_format.type != "text":
            raise not_supported(f"a response_format of type {self.response_format.type[:50]!r}", "response_format")


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    SAMPLING: ClassVar[tuple[str, ...]] = (*GenerationRequest.SAMPLING, "logprobs")


class ForkRequest(SamplingRequest):
    """Branches of a completion that runs. What is left out is as the parent has it; `max_tokens` is what it has left.

    request_id: the parent's `id`, its x-request-id, or the `request_id` of a branch. index: which of its choices.
    """

    request_id: Annotated[str, Field(max_length=200)]
    index: Annotated[int, Field(ge=0)] = 0
    append: str | None = None
    append_token_ids: list[TokenId] | None = None
    logprobs: int | None = None

    SAMPLING: ClassVar[tuple[str, ...]] = (*SamplingRequest.SAMPLING, "max_tokens", "logprobs")


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    prediction: Any = None
    verbosity: str | None = None

    def refuse_what_is_missing(self) -> None:
        super().refuse_what_is_missing()
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "there are no tools to choose from: give tools with tool_choice", param="tool_choice")
        name, names = self.named_tool, [tool.function.name for tool in self.tools or ()]
        if name is not None and name not in names:
            raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def named_tool(self) -> str | None:
        """The function that the answer must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None


class TokenizeRequest(Strict):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    @property
    def offered_tools(self) -> list[Tool]:
        return self.tools or []


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]


class ErrorDetail(BaseModel):
    """For the API's description only."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
