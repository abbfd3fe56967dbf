"""Gluon's kernel for items of one token against attention in float64: on a Hopper GPU, and interpreted without one.

(`tests/kernels/compile_for_sm90.py` compiles it for the card, anywhere.)
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import triton_interpreter  # noqa: F401  # isort: skip
import triton
from test_attention_backends import make_case, make_spec
from test_gluon_attention import hopper
from test_triton_attention import DEVICE, check, replay_over_other_lengths

from quire.attention.triton import TritonBackend
from quire.kernels import gluon
from quire.kernels.gluon import GluonTile, decode_tile, supports_decode
from quire.kernels.torch_ops import TorchKernels

bf16, fp16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Launched:
    tile: GluonTile
    arrivals_EK: torch.Tensor


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What the kernel was launched for."""
    from quire.kernels.gluon import decode

    found, attend = [], decode.attend

    def counted(*args, **kwargs):
        found.append(Launched(args[12], args[8]))
        attend(*args, **kwargs)

    monkeypatch.setattr(decode, "attend", counted)
    return found


def make_backend(tile: GluonTile | None = None, **options) -> TritonBackend:
    return TritonBackend(TorchKernels(), DEVICE, tiles={"low": tile} if tile else None, **options)


def decoding(spec, block_size: int, contexts, seed: int = 0):
    return make_case(spec, block_size, contexts, (1,) * len(contexts), seed)


ALL_ENDS = (1, 5, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 257, 1000)
CASES = {
    "llama": (make_spec((32, 8), 128, bf16), 16, ALL_ENDS),
    "llama-long": (make_spec((32, 8), 128, bf16), 16, (4096, 1, 8192, 700) * 6),
    "llama-one-long": (make_spec((32, 8), 128, bf16), 16, (30_000,)),
    "fp16": (make_spec((8, 2), 128, fp16), 16, ALL_ENDS),
    "mha-64": (make_spec((4, 4), 64, fp16), 64, ALL_ENDS),
    "group-of-2": (make_spec((16, 8), 128, bf16), 32, ALL_ENDS),
    "group-of-3": (make_spec((9, 3), 64, bf16), 16, ALL_ENDS),
    "group-of-7": (make_spec((28, 4), 128, bf16), 16, ALL_ENDS),
    "group-of-8": (make_spec((16, 2), 64, bf16), 128, ALL_ENDS),
    "block-256": (make_spec((8, 2), 128, bf16), 256, ALL_ENDS),
    "not-causal": (make_spec((8, 2), 128, bf16, causal=False), 16, ALL_ENDS),
    "other-scale": (replace(make_spec((8, 2), 64, bf16), scale=1.7), 32, ALL_ENDS),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=hopper) for name in CASES])
def test_is_attention_in_float64(name, launches):
    check(decoding(*CASES[name]), make_backend())
    assert launches


@pytest.mark.parametrize("piece", [pytest.param(piece, marks=hopper) for piece in (None, 128, 1 << 20)])
@pytest.mark.parametrize("head_size", [64, 128])
def test_however_keys_are_cut(piece, head_size, launches):
    """157 pieces of the longest: several turns of the merge."""
    case = decoding(make_spec((32, 8), head_size, bf16), 16, (20_000, 300, 129, 1))
    check(case, make_backend(piece=piece))
    assert [launch.tile for launch in launches] == [decode_tile(head_size)]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=hopper) for seed in range(24)])
def test_random_batches(seed, launches):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(1, 2500, rng.integers(1, 70))
    heads, group, head_size = int(rng.integers(1, 9)), int(rng.integers(1, 9)), (64, 128)[seed // 4 % 2]
    spec = make_spec((heads * group, heads), head_size, (bf16, fp16)[seed % 2])
    case = decoding(spec, (16, 32, 64, 128)[seed // 2 % 4], contexts.tolist(), seed)
    check(case, make_backend(piece=(None, 384)[seed % 3 == 0]))
    assert launches


@pytest.mark.parametrize("steps", [pytest.param(3, marks=hopper)])
def test_a_graph_is_replayed_over_other_lengths(steps, launches):
    replay_over_other_lengths(make_backend(), steps)
    assert launches


ELSEWHERE = {
    "softcap": (make_spec((8, 2), 128, bf16, softcap=30.0), 16, (1,) * len(ALL_ENDS)),
    "window": (make_spec((8, 2), 128, bf16, window=100), 16, (1,) * len(ALL_ENDS)),
    "block-of-8": (make_spec((8, 2), 128, bf16), 8, (1,) * len(ALL_ENDS)),
    "fp32": (make_spec((8, 2), 128), 16, (1,) * len(ALL_ENDS)),
    "head-size-80": (make_spec((8, 2), 80, bf16), 16, (1,) * len(ALL_ENDS)),
    "group-of-9": (make_spec((9, 1), 64, bf16), 16, (1,) * len(ALL_ENDS)),
    "drafts": (make_spec((8, 2), 128, bf16), 16, (1, 2, 1, 3, 4, 1, 1, 2, 1, 1, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=hopper) for name in ELSEWHERE])
def test_all_else_stays_with_triton(name, launches):
    spec, block_size, queries = ELSEWHERE[name]
    check(make_case(spec, block_size, ALL_ENDS, queries), make_backend())
    assert not launches


def test_what_is_supported():
    assert supports_decode(32, 8, 128, bf16)
    assert supports_decode(28, 4, 64, fp16)
    for layer in ((32, 8, 128, torch.float32), (32, 8, 96, bf16), (32, 8, 256, bf16), (9, 1, 64, bf16)):
        assert not supports_decode(*layer)


# -- without a card ------------------------------------------------------------------------------------------------------------
without_card = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the tests above run the kernel itself"),
    pytest.mark.skipif(
        not triton.__version__.startswith(gluon.TRITON_VERSIONS), reason="not for this version of Triton"
    ),
]
SMALL = {
    "llama": (make_spec((8, 2), 128, bf16), 16, (1, 16, 33, 150), None),
    "pieces": (make_spec((4, 1), 128, fp16), 32, (300, 129), 128),
    "group-of-7": (make_spec((7, 1), 128, bf16), 64, (500, 31), 1 << 20),
    "64-elements": (make_spec((2, 2), 64, fp16), 16, (257, 64, 100), 128),
    "blocks-larger-than-turns": (make_spec((2, 1), 64, bf16), 128, (400,), 1 << 20),
}


@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=without_card) for name in SMALL])
def test_interpreted(name, late, launches):
    from gluon_interpreter import interpreted
    from quire.kernels.gluon import decode

    spec, block_size, contexts, piece = SMALL[name]
    tile = decode_tile(spec.head_size)
    with interpreted(decode, late):
        check(decoding(spec, block_size, contexts), make_backend(tile, num_sms=2, piece=piece))
    assert [launch.tile for launch in launches] == [tile]
    assert not launches[0].arrivals_EK.any()  # the next layer counts from 0


NOT_COMPUTED = {
    "one token each": (make_spec((8, 2), 128, bf16), 2),
    "up to 8 heads": (make_spec((9, 1), 128, bf16), 1),
    "no window": (make_spec((8, 2), 128, bf16, window=9), 1),
}


@pytest.mark.parametrize("reason", [pytest.param(reason, marks=without_card) for reason in NOT_COMPUTED])
def test_what_it_does_not_compute_raises(reason):
    spec, query_len = NOT_COMPUTED[reason]
    with pytest.raises(ValueError, match=reason):
        check(make_case(spec, 16, (20,), (query_len,)), make_backend(decode_tile(128), num_sms=2))


def launch_everything() -> None:
    """Each way that a launch is compiled."""
    from quire.kernels.gluon import decode

    for spec, block_size, *_ in SMALL.values():
        group, head_size = spec.num_heads // spec.num_kv_heads, spec.head_size
        q = torch.zeros(4, spec.num_heads, head_size, dtype=spec.kv_dtype)
        kv = torch.zeros(4, 2, spec.num_kv_heads, block_size, head_size, dtype=spec.kv_dtype)
        partial = torch.zeros(8, spec.num_kv_heads, group, head_size)
        words = torch.zeros(64, dtype=torch.int32)
        decode.attend(
            q, kv, words.view(4, 16), torch.zeros_like(q), words.view(8, 8), words[:1], 8, words.view(16, 4), words,
            partial, partial[..., 0].contiguous(), group, decode_tile(head_size), scale=1.0,
        )  # fmt: skip
