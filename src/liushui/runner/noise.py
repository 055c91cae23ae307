"""Stateless noise: a number for (seed, position, token), the same wherever and whenever it is asked for.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the token with the largest
logit / temperature + G is distributed as the softmax, when the G are independent standard Gumbel numbers. With G a
function of (seed, position, token), nothing depends on a row's place in the batch or on what was drawn before.
"""

import numpy as np

MAX_GUMBEL = 23.0
"""No value of `gumbel` is larger: -log(2**-33) = 22.87."""

_MASK64 = (1 << 64) - 1


def row_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words for one row, by the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    x ^= x >> 31
    return x & 0xFFFFFFFF, x >> 32


def row_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`row_key` of many rows at once: seeds [n] uint64, positions [n] -> words [n, 2] uint32."""
    with np.errstate(over="ignore"):
        x = seeds * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = x + np.uint64(0x632BE59BD9B4E019)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    words: np.ndarray = np.stack([x & np.uint64(0xFFFFFFFF), x >> np.uint64(32)], axis=1).astype(np.uint32)
    return words


def _mix(x: np.ndarray) -> np.ndarray:
    """A 32-bit finaliser with low bias (constants: Wellons 2018, hash-prospector)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    mixed: np.ndarray = x ^ (x >> np.uint32(16))
    return mixed


def gumbel(first: np.ndarray, second: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Standard Gumbel numbers, float64 [n], for `row_key` words [n] (or scalars) and token ids [n]."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(tokens.astype(np.uint32) ^ first) + second)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32
    # -log1p(-u) is exponential with full precision at the small values, the ones that win.
    return -np.log(-np.log1p(-uniform))
