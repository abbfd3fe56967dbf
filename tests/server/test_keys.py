"""Keys with names and weights: how they are given, and that no key shows anywhere."""

from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.server.keys import digest, read_keys
from quire.server.options import ServerOptions


def options(tmp_path: Path, text: str, **others: object) -> ServerOptions:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    return ServerOptions(api_keys_file=str(file), **others)  # type: ignore[arg-type]


def test_keys_are_named_by_position_or_by_the_file(tmp_path: Path) -> None:
    text = '[alice]\nkey = ["a-old", "a-new"]\nweight = 2\n["bob.2"]\nkey = "b"\n'
    keys = read_keys(options(tmp_path, text, api_key=("x", "y")))
    expected = [("key-1", "x"), ("key-2", "y"), ("alice", "a-old"), ("alice", "a-new"), ("bob.2", "b")]
    assert [(key.name, key.digest) for key in keys.keys] == [(name, digest(key)) for name, key in expected]
    assert keys.weights == {"alice": 2.0, "bob.2": 1.0}
    assert keys.with_weights({"key-1": 3, "alice": 4}) == {"alice": 4, "bob.2": 1.0, "key-1": 3}
    with pytest.raises(ConfigError, match="'carol', which is no key's name; there are alice"):
        keys.with_weights({"carol": 2})


def test_without_keys_there_is_nothing_to_weigh() -> None:
    keys = read_keys(ServerOptions())
    assert not keys and keys.with_weights(None) is None
    with pytest.raises(ConfigError, match="no key is set"):
        keys.with_weights({"key-1": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("[alice", "is no TOML file"),
        ('[alice]\nkey = "sk-secret\n', "is no TOML file: see line 2"),
        ('alice = "sk-secret"', "must be a table"),
        ('["a b"]\nkey = "sk-secret"', "a name has"),
        ('[alice]\nkye = "sk-secret"', "must be a table with a key"),
        ("[alice]\nweight = 2", "key must be a text"),
        ("[alice]\nkey = []", "has no key"),
        ('[alice]\nkey = "sk secret"', "printable ASCII"),
        ('[alice]\nkey = ""', "printable ASCII"),
        ('[alice]\nkey = "sk-secret"\nweight = 0', "weight must be"),
        ('[alice]\nkey = "sk-secret"\nweight = true', "weight must be"),
        ('[alice]\nkey = "sk-secret"\nweight = nan', "weight must be"),
        ('[alice]\nkey = "sk-secret"\n[bob]\nkey = "sk-secret"', "alice and bob have the same"),
        ('[key-1]\nkey = "sk-secret"', "names of the keys given by --api-key"),
    ],
)
def test_what_is_wrong_is_told_without_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys(options(tmp_path, text, api_key=("other",)))
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(ServerOptions(api_keys_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="too large"):
        read_keys(options(tmp_path, "#" * (2 << 20)))
