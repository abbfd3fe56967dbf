"""Where a model's directory comes from: a path, the hub's cache, the hub; and what is said where it is not to be had."""

from pathlib import Path

import pytest

from quire.errors import ModelError
from quire.hub import resolve_model


def with_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{}")
    return directory


def test_a_local_directory_with_a_config_alone(tmp_path):
    assert resolve_model(str(with_config(tmp_path))) == tmp_path


def test_local_paths_that_are_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(with_config(tmp_path) / "config.json"))
    absent = str(tmp_path / "absent"), "./absent", "a/b/c", "../up", "", "owner/na me"
    for name in (*absent, "no name " * 40, "~nobody-of-this-name/model", "a\0b"):
        with pytest.raises(ModelError, match="no directory"):
            resolve_model(name)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """huggingface_hub without a network, and a cache that holds owner/name at one commit, in the hub's own layout."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_hub_model_in_the_cache_is_found_offline(tmp_path, offline_hub):
    with_config(offline_hub)
    found = resolve_model("owner/name", download_dir=tmp_path)
    assert found == offline_hub
    assert found.name == COMMIT
    assert resolve_model("owner/name", COMMIT, download_dir=tmp_path) == offline_hub


def test_a_hub_model_without_a_config(tmp_path, offline_hub):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model("owner/name", download_dir=tmp_path)


def test_a_hub_model_that_is_not_in_the_cache(tmp_path, offline_hub):
    with pytest.raises(ModelError, match=r"cannot be reached"):
        resolve_model("owner/other", download_dir=tmp_path)
    with pytest.raises(ModelError, match=r"revision 'v2'.*cannot be reached"):
        resolve_model("owner/name", "v2", download_dir=tmp_path)


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(with_config(tmp_path))

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model("gpt2-like", "v1") == tmp_path
    resolve_model("owner/name", config_only=True)
    (first, options), (second, config_only) = asked
    assert (first, options["revision"], second) == ("gpt2-like", "v1", "owner/name")
    assert "*.safetensors" in options["allow_patterns"]
    assert "*.safetensors" not in config_only["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in options["allow_patterns"])


def test_every_failure_of_the_hub_is_a_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    cases = {
        errors.GatedRepoError: "gated",
        errors.RepositoryNotFoundError: "knows no such repository",
        errors.RevisionNotFoundError: "not at revision 'v1'",
        errors.LocalEntryNotFoundError: "cannot be reached",
        TimeoutError: "Downloading",
    }
    for error_type, text in cases.items():

        def fail(*_, error_type=error_type, **__):
            raise error_type.__new__(error_type)  # the hub's own constructors want an HTTP response

        monkeypatch.setattr(hub, "snapshot_download", fail)
        with pytest.raises(ModelError, match=text):
            resolve_model("owner/name", "v1")
