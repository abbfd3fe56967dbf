"""The server's options, validated once and frozen. `quire.cli` makes a command-line option of each. Knows no HTTP library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.errors import ConfigError

LOG_FORMATS = ("text", "json")
TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral", "none")
CHOICES = {"log_format": LOG_FORMATS, "tool_call_parser": TOOL_CALL_PARSERS}

HELP = {
    "host": "address to serve at; 0.0.0.0 is all of the machine's",
    "port": "port to serve at; 0 takes one that is free",
    "api_key": "key of which requests must bring one; may be given several times, or as QUIRE_API_KEY=key,key",
    "api_keys_file": "TOML file of named keys and their weights (see docs/server.md); or QUIRE_API_KEYS_FILE=file",
    "served_model_name": "what requests call the model; may be given several times (default: MODEL)",
    "max_queue": "requests that may wait; further ones are told to try again later",
    "max_prompts": "prompts in one request",
    "max_n": "answers to one prompt, branches of one fork, width of a beam search",
    "max_body_mb": "MiB of a request's body",
    "shutdown_timeout": "seconds that running requests have to finish after a signal",
    "stall_timeout": "seconds without a finished step, with work there, after which /health tells",
    "trust_request_chat_template": "let requests bring chat templates of their own",
    "chat_template_kwarg": "a variable of the chat template that requests may set; may be given several times",
    "tool_call_parser": "form of the tool calls in the model's text; auto is by its chat template, none offers no tools",
    "log_requests": "write a line for each request",
    "log_format": "of that line",
    "log_prompts": "with prompts and answers in it",
}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How one model is served. Raises ConfigError, naming the option, for a value out of range.

    api_key: keys of which a request must bring one; none asks for none. served_model_name: what requests call the model,
    and further names for it; none is the model as it was given. api_keys_file: more keys, with names and weights (`keys.py`).
    max_queue: requests that may wait beside those that run; further ones get a 429. max_prompts: prompts in one request.
    max_n: answers to one prompt, or branches of one fork, width of a beam search. max_body_mb: size of a request's body.
    shutdown_timeout: seconds that requests have to finish after a signal; then they are told that the server stops.
    stall_timeout: seconds without a step, with work there, after which /health says so.
    trust_request_chat_template: let requests bring chat templates of their own.
    chat_template_kwarg: further variables for the chat template that requests may set.
    tool_call_parser: form of the tool calls in the model's text; "auto" is by its chat template, "none" refuses tools.
    log_format: a line for each request, for people or as JSON. log_prompts: with its prompt and its answer's text.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Sequence[str] = ()
    api_keys_file: str | None = None
    served_model_name: Sequence[str] = ()
    max_queue: int = 1024
    max_prompts: int = 256
    max_n: int = 128
    max_body_mb: float = 8.0
    shutdown_timeout: float = 30.0
    stall_timeout: float = 60.0
    trust_request_chat_template: bool = False
    chat_template_kwarg: Sequence[str] = ()
    tool_call_parser: str = "auto"
    log_requests: bool = True
    log_format: str = "text"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("api_key", "served_model_name", "chat_template_kwarg"):
            values = tuple(getattr(self, name) or ())
            object.__setattr__(self, name, values)
            if not all(isinstance(value, str) and value.strip() for value in values):
                raise ConfigError(f"{name} must not be empty")
        for key in self.api_key:
            check_api_key(key, "api_key")
        self._between("port", 0, 65535)
        self._between("max_queue", 0, 1_000_000)
        self._between("max_prompts", 1, 100_000)
        self._between("max_n", 1, 128)
        self._between("max_body_mb", 0.001, 1024.0)
        self._between("shutdown_timeout", 0.0, 3600.0)
        self._between("stall_timeout", 0.1, 86400.0)
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * (1 << 20))

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must be from {low} to {high}, not {value!r}")


def check_api_key(key: str, where: str) -> None:
    """Raises ConfigError, without the key in it."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{where}: a key must be printable ASCII without spaces: it travels in an HTTP header")
