"""Random numbers without a state: a draw is a function of (seed, branch, position) alone.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3): ten
rounds of multiplication and xor turn a 128-bit counter and a 64-bit key into 128 random bits. What sequence draws at what
place is the counter, the seed is the key; so a sequence draws the same tokens whatever else is in its batch, after a
preemption, and on the host or on the device. It knows nothing of tokens.

    counter words = (position low, position high, branch low, branch high), key words = (seed low, seed high)

Shape legend: M = draws.
"""

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter, key):
    """Philox4x32-10 over arrays.

    counter: four, key: two arrays or tensors of one shape that hold 32-bit words in [0, 2**32): NumPy uint64, or torch
    int64. Returns four of the same kind. int64 suffices: a product of two words wraps around to the same 64 bits as an
    unsigned one, and after an arithmetic shift the mask removes the copies of the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _LOW) ^ c1 ^ k0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def _uniform(seed_M, branch_M, position_M):
    high = [(word_M >> 32) & _LOW for word_M in (position_M, branch_M, seed_M)]
    low = [word_M & _LOW for word_M in (position_M, branch_M, seed_M)]
    x0_M, x1_M, _, _ = philox4x32((low[0], high[0], low[1], high[1]), (low[2], high[2]))
    # 27 and 26 bits make the 53 of a double, as in Matsumoto and Nishimura's genrand_res53.
    return (x0_M >> 5) * 67108864 + (x1_M >> 6)


def uniform(seed_M: np.ndarray, branch_M: np.ndarray, position_M: np.ndarray) -> np.ndarray:
    """u_M float64 in [0, 1), each a multiple of 2**-53. All arguments integer arrays of one shape; negative ones wrap."""
    bits_M = _uniform(*(np.asarray(word_M).astype(np.uint64) for word_M in (seed_M, branch_M, position_M)))
    return bits_M.astype(np.float64) * 2.0**-53


def uniform_torch(seed_M: Tensor, branch_M: Tensor, position_M: Tensor) -> Tensor:
    """`uniform` on the device, equal to the last bit. Arguments int64 (a seed above 2**63 as its two's complement)."""
    return _uniform(seed_M, branch_M, position_M).to(torch.float64) * 2.0**-53
