"""Fills a model with weights: from safetensors files, or with noise.

    auto, safetensors   model.safetensors, or the shards that model.safetensors.index.json names
    dummy               seeded noise, for benchmarks and tests without a checkpoint

Files are hostile input: safetensors is the only format (no pickle), and a tensor's name, shape and type are checked
before its bytes are read. Tensors are read one by one, each rank only its share, straight into the fused buffers; so
the peak is the model plus one tensor.

This module knows no model family: where a tensor goes is declared by the layers (`quire.layers.slots`).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quire.errors import ConfigError, WeightsError
from quire.layers.slots import WeightSlot, weight_slots
from quire.model_config import ModelConfig

LOAD_FORMATS = ("auto", "safetensors", "dummy")
INDEX_NAME = "model.safetensors.index.json"

# Element types that a checkpoint may hold, as safetensors names them. Others are quantized or no weights at all.
_FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_INDEX_BYTES = 64 * 2**20

# A prime, so that no matrix's rows line up with the repetition; 8 MB of bf16.
_NOISE_LENGTH = 4_194_301
_DUMMY_STD = 0.02


def resolve_dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    """The torch dtype of "auto" (the config's own, float32 if it names none) or of a name such as "bfloat16".

    Raises ConfigError for an unknown name.
    """
    names = {
        "float32": torch.float32,
        "float": torch.float32,
        "float16": torch.float16,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    name = (config.dtype or "float32") if dtype == "auto" else dtype
    if name not in names:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(names)}.")
    return names[name]


def load_weights(model: nn.Module, directory: str | Path, *, load_format: str = "auto", seed: int = 0) -> None:
    """Fills every parameter of `model` in place, cast to its dtype, from the checkpoint in `directory`.

    With load_format "dummy" `directory` is not looked at, and `seed` decides the values.

    Raises WeightsError, naming file and tensor, unless every parameter is filled exactly once by a tensor of the right
    shape and nothing unknown is left over; ConfigError for an unknown load_format.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format {load_format!r} is unknown; choose one of {', '.join(LOAD_FORMATS)}.")
    if load_format == "dummy":
        init_dummy_weights(model, seed)
        return
    directory = Path(directory)
    slots = {slot.name: slot for slot in weight_slots(model)}
    promised = _promised_files(directory)
    filled: dict[str, Path] = {}
    for path in dict.fromkeys(promised.values()) if promised else _unindexed_files(directory):
        for name in _fill_from(path, slots):
            if name in filled:
                raise WeightsError(f"Tensor {name!r} stands in {filled[name]} and again in {path}; which is right?")
            filled[name] = path
    missing = [name for name in slots if name not in filled]
    if missing:
        where = f"; {INDEX_NAME} promises it in {promised[missing[0]].name}" if missing[0] in promised else ""
        raise WeightsError(
            f"{directory} lacks {len(missing)} of the {len(slots)} tensors that config.json asks for, first "
            f"{missing[0]!r}{where}. The download is incomplete, or the config is another model's."
        )


def init_dummy_weights(model: nn.Module, seed: int = 0) -> None:
    """Fills `model` with noise of standard deviation 0.02, and its norms with ones.

    The same (model, seed) gives the same weights on every device and with every number of ranks. Values repeat after
    4 million: drawing 8 billion would take minutes, copying them takes seconds.
    """
    noise = torch.randn(_NOISE_LENGTH, generator=torch.Generator().manual_seed(seed)).mul_(_DUMMY_STD)
    start = 0
    for slot in weight_slots(model):
        if slot.dummy_value is not None:
            slot.target.fill_(slot.dummy_value)
            continue
        noise = noise.to(slot.target)  # dtype and device; the first time only
        _fill_with_noise(slot, noise, start)
        start = (start + math.prod(slot.full_shape)) % _NOISE_LENGTH


def _fill_with_noise(slot: WeightSlot, noise: Tensor, start: int) -> None:
    """The slot's share of a full tensor whose element i, in row-major order, is noise[(start + i) % length]."""
    full = slot.target if slot.target.shape == slot.full_shape else slot.target.new_empty(slot.full_shape)
    flat = full.view(-1)
    done = 0
    while done < len(flat):
        at = (start + done) % _NOISE_LENGTH
        count = min(len(flat) - done, _NOISE_LENGTH - at)
        flat[done : done + count] = noise[at : at + count]
        done += count
    if full is not slot.target:
        slot.target.copy_(full[slot.share])


def _promised_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says; {} if there is no index. Raises WeightsError for a bad index."""
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        return {}
    try:
        if index_path.stat().st_size > _MAX_INDEX_BYTES:
            raise WeightsError(f"{index_path} is larger than {_MAX_INDEX_BYTES} bytes; it is no index of shards.")
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{index_path} cannot be read as JSON: {error}. Download it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index_path} has no weight_map from tensor names to files.")
    promised = {}
    for name, file_name in weight_map.items():
        # A plain name: an index must not lead out of the directory.
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\\" in file_name:
            raise WeightsError(f"{index_path}: the file of tensor {name!r} must be a plain file name.")
        promised[name] = directory / file_name
    missing = [path.name for path in dict.fromkeys(promised.values()) if not path.is_file()]
    if missing:
        raise WeightsError(
            f"{directory} lacks {len(missing)} of its {len(set(promised.values()))} weight files, first {missing[0]}. "
            "Download them."
        )
    return promised


def _unindexed_files(directory: Path) -> list[Path]:
    """model.safetensors, or else every safetensors file that is not Mistral's second copy of the same weights."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    paths = [p for p in sorted(directory.glob("*.safetensors")) if not p.name.startswith("consolidated")]
    if paths:
        return paths
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
    if pickled:
        raise WeightsError(
            f"{directory} has weights only as pickle ({pickled[0]}), which may run any code; Quire reads safetensors. "
            "Convert them (transformers' save_pretrained writes safetensors) or use another revision."
        )
    raise WeightsError(f'{directory} has no .safetensors file. For random weights, give load_format="dummy".')


def _fill_from(path: Path, slots: dict[str, WeightSlot]) -> Iterator[str]:
    """Copies the file's tensors into their slots and yields each name that had one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                slot = slots.get(name)
                if slot is not None:
                    _fill(slot, file, path)
                    yield name
                elif not _is_harmless(name, slots):
                    raise WeightsError(
                        f"{path}: tensor {name!r} has no place in this model. The weights and config.json (or "
                        "hf_overrides) describe different models."
                    )
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "not there"
        raise WeightsError(
            f"{path} ({size}) is truncated, corrupt or no safetensors file: {error}. Download it again."
        ) from error


def _fill(slot: WeightSlot, file: safe_open, path: Path) -> None:
    stored = file.get_slice(slot.name)
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != slot.full_shape:
        raise WeightsError(
            f"{path}: tensor {slot.name!r} has shape {list(shape)}, but config.json asks for {list(slot.full_shape)}."
        )
    if dtype not in _FLOAT_TYPES:
        raise WeightsError(
            f"{path}: tensor {slot.name!r} has element type {dtype}; Quire loads unquantized weights "
            f"({', '.join(sorted(_FLOAT_TYPES))})."
        )
    slot.target.copy_(stored[slot.share])


def _is_harmless(name: str, slots: dict[str, WeightSlot]) -> bool:
    """Tensors that a checkpoint may hold though the model has no use for them.

    Old exports keep the rotary frequencies, which follow from the config; a tied model's head is a copy of the
    embedding.
    """
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in slots)
