"""`pocket`, the model inside the package: a small Llama trained by us on Python's standard library, for a first try.

The weights lie beside this file. `tools/pocket/` makes them; this module only knows where they are, and loads no torch.
"""

from importlib.resources import files
from pathlib import Path

from quire.errors import ModelError

NAME = "pocket"
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def embedded_name(model: str) -> str | None:
    """The embedded model's name, if `model` is its directory."""
    return NAME if Path(model) == Path(str(files(__name__))) else None


def model_directory() -> Path:
    """The directory of the embedded model, in Hugging Face's form.

        LLM(str(model_directory()))

    Raises ModelError if it is not there as plain files: a checkout without weights, or a package run out of an archive.
    """
    directory = files(__name__)
    if not isinstance(directory, Path):
        raise ModelError(
            f"the embedded model lies inside an archive ({directory}); install Quire unpacked, or name another model"
        )
    missing = [name for name in _NEEDED if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"the embedded model is incomplete: {directory} lacks {', '.join(missing)}. Install Quire again, make the "
            "model with tools/pocket (its README says how), or name another model"
        )
    return directory
