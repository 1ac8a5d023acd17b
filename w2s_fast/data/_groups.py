"""Items of a dataset by group: consecutive parts of a concatenation, or any label an item."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from .. import checks
from ._hash import Ints


class Groups:
    """Where the items of every group lie; memory O(groups) for consecutive ones, O(items) for labels."""

    def __init__(self, sizes: Ints, items: Ints | None) -> None:
        self.sizes = sizes
        self.offsets = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))
        self._items = items

    @classmethod
    def consecutive(cls, op: str, name: str, sizes: Sequence[Any]) -> Groups:
        """Groups one after the other, given by their lengths or by the datasets themselves."""
        found = [len(part) if isinstance(part, Sized) else part for part in sizes]
        if not found:
            checks.fail(op, name, "at least one length or dataset", "none")
        for size in found:
            checks.integer(op, name, int(size) if isinstance(size, np.integer) else size, low=0)
        return cls(np.array(found, dtype=np.int64), None)

    @classmethod
    def labelled(cls, op: str, name: str, labels: Any) -> Groups:
        """The group of every item, numbers from 0."""
        numbers = np.asarray(labels)
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
            checks.fail(op, name, "a vector of group numbers >= 0", f"{numbers.dtype} of shape {numbers.shape}")
        order = np.argsort(numbers, kind="stable").astype(np.int64)
        return cls(np.bincount(numbers).astype(np.int64), order)

    def items(self, group: int, numbers: Ints) -> Ints:
        """Dataset indices of the group's items ``numbers``."""
        places = numbers + self.offsets[group]
        found: Ints = places if self._items is None else self._items[places]
        return found

    def __len__(self) -> int:
        return len(self.sizes)
