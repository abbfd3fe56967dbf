"""Philox against the known answers of its authors, and the uniforms made of it."""

import numpy as np
import pytest
import torch

from quire.sampling.random import philox4x32, uniform, uniform_torch

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(
    "make", [lambda x: np.array([x], np.uint64), lambda x: torch.tensor([x])], ids=["numpy", "torch"]
)
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(make, counter, key, expected):
    assert tuple(int(word[0]) for word in philox4x32(tuple(map(make, counter)), tuple(map(make, key)))) == expected


def test_torch_equals_numpy_to_the_last_bit():
    rng = np.random.default_rng(0)
    seed, branch = rng.integers(0, 2**64, (2, 5000), dtype=np.uint64)
    position = rng.integers(0, 2**40, 5000)
    ours = uniform(seed, branch, position)
    theirs = uniform_torch(*(torch.from_numpy(word.astype(np.int64)) for word in (seed, branch, position)))
    assert (ours == theirs.numpy()).all()
    assert ours.dtype == np.float64
    assert ((ours >= 0) & (ours < 1)).all()


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_uniform_over_each_of_its_arguments(varied):
    words = [np.full(100_000, 7), np.full(100_000, 3), np.full(100_000, 11)]
    words[varied] = np.arange(100_000)
    u = uniform(*words)
    count = np.bincount((u * 100).astype(int), minlength=100)
    assert ((count - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.02
    assert len(np.unique(u)) == 100_000
