"""A random order of n items without a table of n entries."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .. import checks
from ._hash import GOLDEN, Ints, Words, bits, key_of, mix

#: Up to here the order is a table; beyond, a Feistel network.
TABLE = 1024
ROUNDS = 8


class KeyedPermutation:
    """A bijection of ``range(n)`` chosen by a key, computed position by position in O(1) time and memory.

    Item ``p`` of the order is ``permutation(positions)[...]``, so a worker, a rank or a resumed run computes the part
    that it needs. Above 1024 items it is a Feistel network of 8 rounds on ``Z_a x Z_b`` with ``a = ceil(sqrt(n))`` and
    ``b = ceil(n / a)``, ``l += F(r) mod a`` and ``r += F(l) mod b`` in turn; the few results beyond n (at most
    ``a`` of ``a b``) are put through it again until they are below.

    Args:
        n: how many items, from 1 to 2^62.
        key: numbers and words that choose the order, say ``(seed, epoch)``.

    Raises:
        ValueError, TypeError: naming `n`.

    Example:
        >>> import numpy as np
        >>> from w2s_fast.data import KeyedPermutation
        >>> order = KeyedPermutation(10**9, 0)
        >>> len(set(order(np.arange(1000)).tolist()))
        1000
    """

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = checks.integer("data.KeyedPermutation", "n", n, low=1, high=1 << 62)
        word = key_of(*key)
        self._table: Ints | None = None
        if n <= TABLE:
            self._table = np.argsort(bits(word, np.arange(n)), kind="stable").astype(np.int64)
            return
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = [key_of(word, r) for r in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: Ints) -> Ints:
        """The items at ``positions``, an int64 array of numbers in [0, n)."""
        if self._table is not None:
            return self._table[positions]
        items = self._network(positions.astype(np.uint64))
        beyond = np.flatnonzero(items >= self.n)
        while len(beyond):
            items[beyond] = self._network(items[beyond])
            beyond = beyond[items[beyond] >= self.n]
        return items.astype(np.int64)

    def _network(self, x: Words) -> Words:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for r, key in enumerate(self._keys):
            drawn = mix((left if r % 2 else right) * np.uint64(GOLDEN) + np.uint64(key)) >> np.uint64(32)
            if r % 2:
                right = right + (drawn * b >> np.uint64(32))
                right = np.where(right >= b, right - b, right)
            else:
                left = left + (drawn * a >> np.uint64(32))
                left = np.where(left >= a, left - a, left)
        return left * b + right


@lru_cache(maxsize=1024)
def permutation(n: int, *key: int | str) -> KeyedPermutation:
    """A `KeyedPermutation` that several batches in a row use."""
    return KeyedPermutation(n, *key)
