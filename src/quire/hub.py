"""Where a model's files are: a local directory, or one that is downloaded from the Hugging Face hub.

Reads none of them, and knows no torch.
"""

import os
import re
from pathlib import Path

from quire.errors import ModelError


def resolve_model(
    model: str,
    revision: str | None = None,
    *,
    download_dir: str | Path | None = None,
    config_only: bool = False,
) -> Path:
    """The local directory of `model`: a directory's path, or a name on the Hugging Face hub, which is downloaded.

    Only weights (safetensors), JSON and tokenizer files at the repository's top are fetched; `config_only` leaves the
    weights out. `revision` is a branch, a tag or a commit, for hub names only. The hub's own environment
    variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) are honoured. The directory of a hub model is named by its commit.

    Raises ModelError if there is neither such a directory nor such a repository, or if it holds no config.json.
    """
    # by os.path, for which a name that is too long, or of no user, names nothing; an empty Path would be the working directory
    path = Path(os.path.expanduser(model))
    if not model or not os.path.isdir(path):
        if os.path.isfile(path):
            raise ModelError(f"{model!r} is a file; give the directory that holds config.json and the weights.")
        is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model)
        if not is_hub_name:
            raise ModelError(f"There is no directory {model!r}, and it is not a name on the hub ('owner/name') either.")
        path = _download(model, revision, download_dir, config_only)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; a model directory in Hugging Face's form has one.")
    return path


def _download(repo_id: str, revision: str | None, download_dir: str | Path | None, config_only: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    wanted = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        directory = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=wanted if config_only else [*wanted, "*.safetensors"],
            # Subfolders hold other formats, and consolidated*.safetensors the same weights under other names.
            ignore_patterns=["*/*", "consolidated*.safetensors"],
        )
    except errors.GatedRepoError as error:
        raise ModelError(f"{repo_id!r} is gated: ask for access on its page, then set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no local directory {repo_id!r}, and the hub knows no such repository (if it is private, set "
            "HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"The hub has {repo_id!r}, but not at revision {revision!r}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"There is no local directory {repo_id!r}; {at} is not in the local cache and the hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set). Give the path of a local model directory, or go online once."
        ) from error
    except Exception as error:  # the client raises its HTTP library's own types, which change between its versions
        raise ModelError(f"Downloading {at} failed: {type(error).__name__}: {error}") from error
    return Path(directory)
