"""The least time that a step can take, from what it must read and compute and from what the machine reaches at that.

    floor of a step = max(weights / read rate, operations / matmul rate) + keys and values / read rate

Weights are those of the linear layers, and of the output head if the step samples; the input embedding isn't read. Operations
are those of the linear layers for each token, of the head for each *sampled* position, and of attention: 4 for each query
head, element of a head, query and key that it sees (two products, a multiplication and an addition each). In the last layer,
tokens that nothing is drawn from need keys and values alone. Keys and values are read once a step by each sequence. Norms,
biases, activations and the last layer's attention, well under 1 % of either, are left out.

Both rates are ceilings measured in the same run, so that a share of the floor means the same on any machine. It can be above 1
on a CPU whose caches hold the model: the read rate is the memory's.

Example, the shape of Llama-3.1-8B in bf16 at 4.24 TB/s and 781 TFLOP/s, one token of one sequence of 512: 15.0 GB of weights
take 3.54 ms, 67 MB of keys and values 0.016 ms, and 15 GFLOP hide behind the weights: the floor is 3.56 ms.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.model_config import ModelConfig

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes read a second, and operations a second of a large matrix product."""

    read: float
    matmul: float

    def facts(self) -> dict[str, float]:
        return {"read TB/s": self.read / 1e12, "matmul TFLOP/s": self.matmul / 1e12}


@dataclass(frozen=True)
class Floor:
    """Seconds that a step, or several, take at least. Floors add up."""

    weights_s: float = 0.0
    matmul_s: float = 0.0
    kv_s: float = 0.0
    seconds: float = 0.0
    """max(weights_s, matmul_s) + kv_s of each step."""

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.weights_s + other.weights_s,
            self.matmul_s + other.matmul_s,
            self.kv_s + other.kv_s,
            self.seconds + other.seconds,
        )

    def facts(self) -> dict[str, float]:
        return {"weights s": self.weights_s, "matmul s": self.matmul_s, "KV s": self.kv_s}


@dataclass(frozen=True)
class ModelWork:
    """What a model's steps must read and compute. `dtype` is of weights, `kv_dtype` of keys and values, as in `DTYPES`."""

    model: ModelConfig
    dtype: str
    kv_dtype: str

    @property
    def layer_weights(self) -> int:
        """Elements of all linear layers."""
        model = self.model
        attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
        return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Elements of the output head, tied to the embedding or not."""
        return self.model.vocab_size * self.model.hidden_size

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.model.num_layers * self._kv_layer_bytes

    @property
    def _kv_layer_bytes(self) -> int:
        return 2 * self.model.num_kv_heads * self.model.head_dim * ITEM_BYTES[self.kv_dtype]

    def weight_bytes(self, num_samples: int) -> int:
        return (self.layer_weights + self.head_weights * (num_samples > 0)) * ITEM_BYTES[self.dtype]

    def flops(self, starts: np.ndarray, num_tokens: np.ndarray, num_samples: int) -> int:
        """Of a step whose entry i computes the tokens at starts[i] .. starts[i] + num_tokens[i] - 1 of its sequence.

        num_samples: rows of the head's product; samples of one entry share one.
        """
        model, total = self.model, int(num_tokens.sum())
        of_layer = self.layer_weights // model.num_layers
        kv_alone = 2 * model.num_kv_heads * model.head_dim * model.hidden_size
        linear = self.layer_weights * total + self.head_weights * num_samples
        linear -= (of_layer - kv_alone) * max(0, total - num_samples)
        pairs = sum(
            layers * int(_pairs(starts, num_tokens, window).sum())
            for window, layers in Counter(model.layer_windows[:-1]).items()
        )
        return 2 * linear + 4 * model.num_heads * model.head_dim * pairs

    def kv_bytes(self, starts: np.ndarray, num_tokens: np.ndarray) -> int:
        """Keys and values that the entries' queries see, this step's own included, each once."""
        total = 0
        for window, layers in Counter(self.model.layer_windows).items():
            seen = starts + num_tokens
            if window is not None:
                seen = np.minimum(seen, num_tokens + window - 1)
            total += layers * int(seen.sum())
        return total * self._kv_layer_bytes

    def floor(self, ceilings: Ceilings, starts: np.ndarray, num_tokens: np.ndarray, num_samples: int) -> Floor:
        starts, num_tokens = starts.astype(np.int64), num_tokens.astype(np.int64)
        if not len(starts):
            return Floor()
        weights_s = self.weight_bytes(num_samples) / ceilings.read
        matmul_s = self.flops(starts, num_tokens, num_samples) / ceilings.matmul
        kv_s = self.kv_bytes(starts, num_tokens) / ceilings.read
        return Floor(weights_s, matmul_s, kv_s, max(weights_s, matmul_s) + kv_s)


def _pairs(starts: np.ndarray, num_tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Of queries and keys that they see, for each entry: the query at position p sees min(p + 1, window) keys.

    5 tokens from position 2 on, window 4: 3 + 4 + 4 + 4 + 4 = 19.
    """

    def up_to(end: np.ndarray) -> np.ndarray:
        growing = end if window is None else np.minimum(end, window)
        full = 0 if window is None else np.maximum(end - window, 0) * window
        return growing * (growing + 1) // 2 + full

    return up_to(starts + num_tokens) - up_to(starts)


# -- ceilings ----------------------------------------------------------------------------------------------------------------
def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Of "cpu", on as many threads as torch has then, or of "cuda", for which about 5 GiB of its memory must be free.

    Takes a second or two.
    """
    found = _measure_cuda(dtype) if device.startswith("cuda") else _measure_cpu(dtype)
    return Ceilings(*found)


def _measure_cuda(dtype: str) -> tuple[float, float]:
    import gc

    import torch

    from quire.bench import kernels

    device = torch.device("cuda")
    found = kernels.measure_ceilings(device, repeat=3)
    matmul = found["matmul TFLOP/s"]
    if dtype == "float32":  # what kernels are held against is in bf16
        a, b = (torch.randn(4096, 4096, device=device) for _ in range(2))
        matmul = 2 * 4096**3 / kernels.time_graph([lambda: a @ b] * 2, 3) / 1e12
    gc.collect()
    torch.cuda.empty_cache()  # an engine takes what is free
    return found["read TB/s"] * 1e12, matmul * 1e12


def _measure_cpu(dtype: str) -> tuple[float, float]:
    """Reading: a sum over 256 MiB. A product of 1024 x 1024. The fastest of several, for a CPU is seldom left alone."""
    import torch

    words = torch.ones(2**26)
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    read_s = _fastest(lambda: words.sum())
    matmul_s = _fastest(lambda: a @ b)
    return words.nbytes / read_s, 2 * 1024**3 / matmul_s


def _fastest(call: Callable[[], Any], enough_s: float = 0.5, most: int = 8) -> float:
    """Seconds of the fastest of up to `most` calls, after one that warms up; fewer if they take more than `enough_s`."""
    call()
    times: list[float] = []
    while len(times) < 2 or (len(times) < most and sum(times) < enough_s):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return min(times)
