"""Who may ask: keys, the names by which their requests are told apart and logged, and their weights.

A key itself is kept as a digest only, and stands in no log and no answer. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.server.options import ServerOptions, check_api_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str  # of whose it is
    digest: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """All that are valid; none asks for none. weights: name -> share of token time, where it was given."""

    keys: tuple[ApiKey, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys)

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.keys}

    def with_weights(self, given: Mapping[str, float] | None) -> dict[str, float] | None:
        """The file's weights and those given on the command line, which win. Raises ConfigError for a name without a key."""
        for name in given or {}:
            if name not in self.names:
                known = ", ".join(sorted(self.names)) or "none: no key is set"
                raise ConfigError(f"client_weights names {name!r}, which is no key's name; there are {known}")
        return {**self.weights, **(given or {})} or None


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(options: ServerOptions) -> Keys:
    """The keys of `api_key`, which are called key-1, key-2, …, and those of `api_keys_file`:

        [alice]
        key = "sk-…"              # or several: ["sk-old", "sk-new"]
        weight = 2                # twice the token time of a weight of 1, the default

    Raises ConfigError, never with a key in it.
    """
    keys = [ApiKey(f"key-{i}", digest(key)) for i, key in enumerate(options.api_key, start=1)]
    weights: dict[str, float] = {}
    if options.api_keys_file is not None:
        for name, values, weight in _entries(options.api_keys_file):
            keys += [ApiKey(name, digest(value)) for value in values]
            weights[name] = weight
    seen: dict[bytes, str] = {}
    for key in keys:
        if key.digest in seen:
            raise ConfigError(f"{seen[key.digest]} and {key.name} have the same API key")
        seen[key.digest] = key.name
    if len({key.name for key in keys[: len(options.api_key)]} & weights.keys()):
        raise ConfigError(f"{options.api_keys_file}: key-1, key-2, … are the names of the keys given by --api-key")
    return Keys(tuple(keys), weights)


def _entries(name: str) -> Iterator[tuple[str, list[str], float]]:
    """Name, keys and weight of each table."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the keys in {name}: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{name} is too large for a file of keys")
    try:
        tables = tomllib.loads(data.decode())
    except ValueError as error:  # its message may quote a key
        where = re.search(r"\(at (line \d+, column \d+)\)", str(error))
        raise ConfigError(f"{name} is no TOML file" + (f": see {where[1]}" if where else "")) from None
    if not tables:
        raise ConfigError(f"{name} has no keys")
    for client, table in tables.items():
        yield client, *_read_table(f"{name}: {client[:64]!r}", client, table)


def _read_table(where: str, client: str, table: Any) -> tuple[list[str], float]:
    if not _NAME.fullmatch(client):
        raise ConfigError(f"{where}: a name has up to 64 letters, digits, dots, dashes and underscores")
    if not isinstance(table, dict) or not table.keys() <= {"key", "weight"}:
        raise ConfigError(f"{where} must be a table with a key, and a weight if wanted")
    values = table.get("key")
    values = values if isinstance(values, list) else [values]
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: key must be a text, or a list of texts")
        check_api_key(value, where)
    weight = table.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-3 <= weight <= 1e3:
        raise ConfigError(f"{where}: weight must be a number from 0.001 to 1000")
    if not values:
        raise ConfigError(f"{where} has no key")
    return values, float(weight)
