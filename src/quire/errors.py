"""What can go wrong for a user, as a tree of exceptions.

    QuireError
    ├── ConfigError           an option is out of range, unknown, or contradicts another one      (also a ValueError)
    ├── RequestError          a request is wrong or cannot ever be served; others are unharmed    (also a ValueError)
    ├── ModelError            a model directory, its config.json or its tokenizer is unusable
    │   └── WeightsError      a weight file is missing, corrupt, truncated or of the wrong shape
    ├── CapacityError         the machine has too little memory for what was asked
    └── EngineDeadError       the engine stopped; running requests are lost

Every message names the thing that is wrong and what to do about it. Our own mistakes are `assert`ed instead.
"""


class QuireError(Exception):
    """Base of every error that Quire raises for a user's eyes."""


class ConfigError(QuireError, ValueError):
    """An option is out of range, unknown, or contradicts another one."""


class RequestError(QuireError, ValueError):
    """A request is malformed or can never be served.

    `param` names the offending field, as OpenAI's error objects do, or is None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(QuireError):
    """A model directory, its config.json or its tokenizer cannot be used."""


class WeightsError(ModelError):
    """A weight file is missing, corrupt, truncated, or does not match the config."""


class CapacityError(QuireError):
    """The machine has too little memory for the model or its KV cache."""


class EngineDeadError(QuireError):
    """The engine has stopped; its running requests are lost."""
