"""Values of a JSON object that nobody vouches for, read one by one."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from quire.errors import ModelError


@dataclass(frozen=True)
class Values:
    """A JSON object; each value is checked as it is read, and messages name its key, behind `where`."""

    values: Mapping[str, object]
    where: str = ""

    def error(self, key: str, wanted: str) -> ModelError:
        # reprlib: a hostile value may be long or deep
        return ModelError(f"config: {self.where}{key} must be {wanted}, but is {reprlib.repr(self.values.get(key))}.")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null: Hugging Face writes null for "not set"."""
        return self.values.get(key) is not None

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelError(f"config: {self.where}{key} is missing.")
        # bool is an int to Python, and to no one else
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelError(f"config: {self.where}{key} is missing.")
        # The comparison also refuses NaN and, `high` being finite, infinity and integers too large for a float.
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of ids; () if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.error(key, f"a token id below vocab_size {vocab_size}, or a list of such ids")
        return tuple(dict.fromkeys(ids))
