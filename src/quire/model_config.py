"""What a model is: a Hugging Face directory's config.json read into a frozen, checked `ModelConfig`.

    >>> directory = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")      # of `quire.hub`
    >>> config = load_model_config(directory)
    >>> config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    (30, 9, 3, 64)

Every value in the file is taken for hostile: its type and its range are checked here, once, with a message that names the key
(`config_values`), so that no other module has to. Where the file is silent, the defaults are those of transformers. Code that
a repository ships is never run.

This module knows no torch and no transformers, opens no weight file, and does not know how a model computes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from quire.config_values import Values
from quire.errors import ConfigError, ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
DTYPES = ("float32", "float16", "bfloat16")

# Caps stand far above every published model and far below what would exhaust memory while we merely look at the file.
MAX_CONFIG_BYTES = 16 * 2**20
MAX_LAYERS = 4096
MAX_WIDTH = 2**20  # hidden_size, intermediate_size
MAX_HEADS = 2**14
MAX_HEAD_DIM = 2**12
MAX_VOCAB = 2**26
MAX_POSITIONS = 2**28

# What each model_type implies for keys that its config.json leaves out. A key that stands in no table is required.
_DEFAULTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "llama": {},
        "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
        "qwen2": {"num_key_value_heads": 32},
        "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
        "smollm3": {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    }
)
SUPPORTED_MODEL_TYPES = tuple(_DEFAULTS)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its base, its size and how it is stretched beyond the length of training.

    `rotary_dim` is the number of leading dimensions of a head that turn (even, at most head_dim). `factor` is 1.0 for
    "default". `original_max_position_embeddings` is the length that the scaling starts from. The other fields belong
    to the type that their comment names and keep their defaults elsewhere; names and meaning are Hugging Face's.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only language model, and the facts about it that serving needs.

    `layer_windows[i]` is layer i's sliding window in tokens, the token itself included, or None where it sees all.
    `layer_ropes[i]` is False where layer i has no positions at all (SmolLM3's NoPE layers).
    `dtype` is one of `DTYPES`, or None where the config names none.
    `eos_token_ids` are all ids that end a sequence: generation_config.json's where it has any, else config.json's.
    `hf` is config.json after the overrides, as parsed; `generation` is generation_config.json ({} if absent).
    """

    model_type: str
    architectures: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[bool, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str | None
    hf: Mapping[str, object] = field(compare=False, repr=False, default_factory=dict)
    generation: Mapping[str, object] = field(compare=False, repr=False, default_factory=dict)

    @property
    def derived_max_model_len(self) -> int:
        """The longest sequence, in tokens, that the positions are good for, scaling included.

        Linear and dynamic scaling stretch `max_position_embeddings`, yarn stretches
        `original_max_position_embeddings`; llama3's `max_position_embeddings` is already stretched.

            Qwen2.5 with yarn: factor 4.0, original 32,768, max_position_embeddings 32,768  ->  131,072
            Llama 3.1: factor 8.0, original 8,192, max_position_embeddings 131,072          ->  131,072
        """
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            return int(self.rope.original_max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    def resolve_max_model_len(self, max_model_len: int | None = None) -> int:
        """The length to serve: `max_model_len` if given, else the derived one.

        Raises ConfigError if it is below 1 or above `derived_max_model_len`, where the model's output is noise.
        """
        derived = self.derived_max_model_len
        if max_model_len is None:
            return derived
        if not 1 <= max_model_len <= derived:
            raise ConfigError(
                f"max_model_len is {max_model_len}, but this model's positions allow 1 to {derived} "
                f"(max_position_embeddings {self.max_position_embeddings}, rope type {self.rope.rope_type!r}, factor "
                f"{self.rope.factor}). Lower max_model_len, or stretch the positions with hf_overrides, for example "
                '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}.'
            )
        return max_model_len

    @property
    def num_parameters(self) -> int:
        """How many weights the model has; tied embeddings count once."""
        hidden, q_size, kv_size = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
        attention += self.qkv_bias * (q_size + 2 * kv_size) + self.o_bias * hidden + self.qk_norm * 2 * self.head_dim
        mlp = 3 * hidden * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + hidden)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + 2 * hidden) + hidden


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_model_config(directory: str | Path, hf_overrides: Mapping[str, object] | None = None) -> ModelConfig:
    """Reads `directory`/config.json, and generation_config.json where there is one; no weights need be there.

    `hf_overrides` is merged over config.json, nested objects key by key: {"rope_scaling": {"factor": 2.0}} keeps the
    other rope keys, {"sliding_window": None} removes a window.

    Raises ModelError if a file is missing or is not a JSON object, if a value is out of range, or if the model is of a
    kind that Quire cannot run.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json.")
    generation_path = directory / "generation_config.json"
    generation = _read_json_object(generation_path) if generation_path.is_file() else {}
    return parse_model_config(_read_json_object(directory / "config.json"), generation, hf_overrides)


def _read_json_object(path: Path) -> dict[str, object]:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} has {size_bytes} bytes; a config has at most {MAX_CONFIG_BYTES}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an endless integer
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def parse_model_config(
    config: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    hf_overrides: Mapping[str, object] | None = None,
) -> ModelConfig:
    """`load_model_config` on objects that are already parsed. Raises ModelError likewise."""
    generation, overrides = dict(generation or {}), dict(hf_overrides or {})
    merged = _merge(config, overrides)
    model_type = merged.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        if merged.get("auto_map"):
            raise ModelError(
                f"The model wants code of its own repository to be run (auto_map, model_type {model_type!r}); Quire "
                f"never does that. Supported model types: {supported}."
            )
        raise ModelError(f"config: model_type {model_type!r} is not supported. Supported: {supported}.")
    if merged.get("quantization_config"):
        raise ModelError("config: quantization_config is set, but Quire loads only unquantized weights.")
    raw = Values({**_DEFAULTS[model_type], **merged})

    hidden_size = raw.integer("hidden_size", 1, MAX_WIDTH)
    num_layers = raw.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads = raw.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = raw.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config: num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}."
        )
    if not raw.has("head_dim") and hidden_size % num_heads:
        raise ModelError(
            f"config: hidden_size {hidden_size} must be a multiple of num_attention_heads {num_heads} where head_dim "
            "is not given."
        )
    head_dim = raw.integer("head_dim", 1, MAX_HEAD_DIM, default=hidden_size // num_heads)
    vocab_size = raw.integer("vocab_size", 1, MAX_VOCAB)
    max_position_embeddings = raw.integer("max_position_embeddings", 1, MAX_POSITIONS)
    hidden_act = raw.string("hidden_act", "silu")
    if hidden_act not in ("silu", "swish"):  # two names of one function
        raise ModelError(f"config: hidden_act {hidden_act!r} is not supported; {model_type} models use 'silu'.")

    # Qwen2 has biases on q, k and v whatever its config says; Mistral has none whatever its config says.
    has_attention_bias = model_type in ("llama", "qwen3", "smollm3") and raw.boolean("attention_bias", False)
    layer_ropes = _layer_ropes(raw, model_type, num_layers)
    bos = raw.token_ids("bos_token_id", vocab_size)
    own_eos = raw.token_ids("eos_token_id", vocab_size)
    generation_eos = Values(generation, "generation_config's ").token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        model_type=model_type,
        architectures=raw.strings("architectures"),
        hidden_size=hidden_size,
        intermediate_size=raw.integer("intermediate_size", 1, MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=raw.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope=_rope_config(
            {**_rope_mapping(Values({**_DEFAULTS[model_type], **config})), **_rope_mapping(Values(overrides))},
            head_dim,
            max_position_embeddings,
        ),
        tie_word_embeddings=raw.boolean("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2" or has_attention_bias,
        o_bias=has_attention_bias,
        mlp_bias=model_type in ("llama", "smollm3") and raw.boolean("mlp_bias", False),
        qk_norm=model_type == "qwen3",
        hidden_act=hidden_act,
        layer_windows=_layer_windows(raw, model_type, layer_ropes),
        layer_ropes=layer_ropes,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=generation_eos or own_eos,
        dtype=_dtype(raw),
        hf=merged,
        generation=generation,
    )


def _merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """`over` laid over `base`: objects that both have are merged, every other value of `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _dtype(raw: Values) -> str | None:
    """transformers 5 writes `dtype`, older ones `torch_dtype`; some files say "torch.bfloat16"."""
    for key in ("dtype", "torch_dtype"):
        if raw.has(key):
            name = raw.string(key, "").removeprefix("torch.")
            if name not in DTYPES:
                raise raw.error(key, f"one of {', '.join(DTYPES)}")
            return name
    return None


def _layer_windows(raw: Values, model_type: str, layer_ropes: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Each layer's sliding window.

    Mistral's holds for all layers. The others have one only if use_sliding_window says so, on the layers that
    layer_types names; without layer_types, on those from max_window_layers up (Qwen) or without rope (SmolLM3).
    Example: Qwen2, 4 layers, max_window_layers 3, sliding_window 64 -> (None, None, None, 64).
    """
    num_layers = len(layer_ropes)
    if model_type == "llama" or not raw.has("sliding_window"):
        return (None,) * num_layers
    if model_type != "mistral" and not raw.boolean("use_sliding_window", False):
        return (None,) * num_layers
    window = raw.integer("sliding_window", 1, MAX_POSITIONS)
    if model_type == "mistral":
        return (window,) * num_layers
    if raw.has("layer_types"):
        layer_types = raw.strings("layer_types")
        if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
            raise raw.error(
                "layer_types", f"a list of {num_layers} times 'full_attention' or 'sliding_attention', one for a layer"
            )
        return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
    if model_type == "smollm3":
        return tuple(None if has_rope else window for has_rope in layer_ropes)
    first = raw.integer("max_window_layers", 0, MAX_LAYERS, default=28)
    return tuple(window if i >= first else None for i in range(num_layers))


def _layer_ropes(raw: Values, model_type: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers have positions: all, but for SmolLM3, whose `no_rope_layers` holds a 1 where a layer *has* rope."""
    if model_type != "smollm3":
        return (True,) * num_layers
    flags = raw.values.get("no_rope_layers")
    if flags is None:
        interval = raw.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=4)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
        raise raw.error("no_rope_layers", f"a list of {num_layers} numbers 0 or 1")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _rope_mapping(raw: Values) -> dict[str, object]:
    """The rope keys of a config, of whichever generation, in the one flat form {rope_type, rope_theta, factor, ...}.

        old   {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
        new   {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}

    Where a config has both, rope_scaling wins, as in transformers. Null means no scaling.
    """
    rope: dict[str, object] = {}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if raw.has(key):
            rope[key] = raw.values[key]
    for key in ("rope_parameters", "rope_scaling"):
        if key not in raw.values:
            continue
        section = raw.values[key]
        if section is None:
            rope.setdefault("rope_type", "default")
            continue
        if not isinstance(section, dict):
            raise raw.error(key, "an object or null")
        if any(isinstance(value, dict) for value in section.values()):
            raise ModelError(f"config: {key} differs by layer type, which Quire does not support.")
        section = dict(section)
        legacy_type = section.pop("type", None)
        if legacy_type is not None:
            section.setdefault("rope_type", legacy_type)
        rope.update(section)
    return rope


def _rope_config(rope: Mapping[str, object], head_dim: int, max_position_embeddings: int) -> RopeConfig:
    raw = Values(rope, "rope_parameters / rope_scaling: ")
    rope_type = raw.string("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise raw.error("rope_type", f"one of {', '.join(ROPE_TYPES)}")
    rotary_dim = int(head_dim * raw.number("partial_rotary_factor", 0.0, 1.0, default=1.0))
    # Dimensions turn in pairs, and dynamic scaling's exponent is dim / (dim - 2).
    if rotary_dim % 2 or rotary_dim < (4 if rope_type == "dynamic" else 2):
        raise ModelError(
            f"config: head_dim {head_dim} times partial_rotary_factor gives {rotary_dim} rotary dimensions; it must be "
            "an even number of 2 or more (4 or more with dynamic scaling)."
        )
    # Only these two types know of a length of training other than max_position_embeddings.
    original = max_position_embeddings
    if rope_type in ("yarn", "llama3"):
        original = raw.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=original)
    # Every scaling needs its factor; yarn's may be left to the ratio of the two lengths.
    factor = 1.0
    if rope_type != "default":
        ratio = max(1.0, max_position_embeddings / original) if rope_type == "yarn" else None
        factor = raw.number("factor", 1.0, 1e6, default=ratio)
    if factor * max_position_embeddings > MAX_POSITIONS:
        raise raw.error("factor", f"such that the stretched length stays within {MAX_POSITIONS} positions")
    rope_config = RopeConfig(
        rope_type=rope_type,
        # Above 1: its logarithm divides in yarn, and a base of 1 would turn all pairs alike.
        theta=raw.number("rope_theta", 1.001, 1e18, default=10_000.0),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=original,
        factor=factor,
    )

    def optional(key: str) -> float | None:
        return raw.number(key, 0.0, 1e6) if raw.has(key) else None

    if rope_type == "yarn":
        return replace(
            rope_config,
            attention_factor=optional("attention_factor"),
            beta_fast=raw.number("beta_fast", 1e-6, 1e6, default=32.0),
            beta_slow=raw.number("beta_slow", 1e-6, 1e6, default=1.0),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
            truncate=raw.boolean("truncate", True),
        )
    if rope_type == "llama3":
        low, high = raw.number("low_freq_factor", 1e-6, 1e6), raw.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise raw.error("high_freq_factor", f"above low_freq_factor {low:g}")
        return replace(rope_config, low_freq_factor=low, high_freq_factor=high)
    return rope_config
