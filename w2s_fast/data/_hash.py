"""Random numbers that are functions of a key and a counter: the same on every machine and in every version of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's constants


def mix(x: Words) -> Words:
    """A bijection of 64-bit words in which every bit of the input moves every bit of the output (splitmix64's)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """One 64-bit key from numbers and words, in their order."""
    found = 0
    for part in parts:
        number = part if isinstance(part, int) else int.from_bytes(part.encode(), "little")
        while True:  # a number or word of any length, 64 bits at a time
            word = (found + GOLDEN) & MASK ^ (number & MASK)
            word = (word ^ word >> 30) * FIRST & MASK
            word = (word ^ word >> 27) * SECOND & MASK
            found = word ^ word >> 31
            number >>= 64
            if number in (0, -1):
                break
    return found


def bits(key: int, counters: NDArray[Any]) -> Words:
    """64 random bits for every counter."""
    spread = counters.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
    return mix(mix(spread) ^ np.uint64(key >> 32 | (key & 0xFFFFFFFF) << 32))


def uniform(key: int, counters: NDArray[Any]) -> NDArray[np.float64]:
    """A number in [0, 1) for every counter."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(key: int, counters: NDArray[Any], limit: int) -> Ints:
    """An integer in [0, limit) for every counter; ``limit`` may be up to 2^53."""
    return np.minimum(uniform(key, counters) * limit, limit - 1).astype(np.int64)
