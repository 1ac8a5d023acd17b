"""Batches with an exact share of old data."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from .. import checks
from ._base import StreamBatchSampler
from ._groups import Groups
from ._hash import Ints
from .permutation import permutation


class ReplayMixtureBatchSampler(StreamBatchSampler):
    """Every global batch has exactly ``round(fraction * batch_size)`` old indices, spread over the ranks.

    Papers 12, 73 and 76.

    Indices of the concatenation ``new + old``: new ones below ``len(new)``, old ones from there on. An epoch gives
    every new item once; an incomplete last batch is dropped, or (``drop_last=False``) its new part is filled up from
    the next epoch's order. The old data run through random orders of their own, epoch after epoch, each item once
    before any comes again. The batch of a step is found in O(batch) without looking at the steps before it.

    Args:
        new, old: datasets or their lengths.
        fraction: in [0, 1); compute-equivalent, the batch keeps its size.
        batch_size: of all ranks together; a multiple of ``world_size``.
        seed, rank, world_size: see `StreamBatchSampler`.

    Raises:
        ValueError, TypeError: naming the argument; a rounded share of the whole batch leaves nothing for new data.

    Example:
        >>> from w2s_fast.data import ReplayMixtureBatchSampler
        >>> batches = list(ReplayMixtureBatchSampler(30, 1000, 0.25, 8))
        >>> len(batches), {sum(index >= 30 for index in batch) for batch in batches}
        (5, {2})
    """

    def __init__(
        self, new: Sized | int, old: Sized | int, fraction: float, batch_size: int, *, drop_last: bool = True,
        seed: int = 0, rank: int | None = None, world_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size)
        self.fraction = checks.number(self._op, "fraction", fraction, low=0.0, high=1.0)
        self._groups = Groups.consecutive(self._op, "new and old", [new, old])
        self.replayed = int(np.floor(self.fraction * batch_size + 0.5))
        self._fresh = batch_size - self.replayed
        if not self._fresh:
            checks.fail(self._op, "fraction", f"small enough to leave new data in a batch of {batch_size}", fraction)
        for name, size, needed in zip(("new", "old"), self._groups.sizes.tolist(), (1, self.replayed), strict=True):
            if needed and not size:
                checks.fail(self._op, name, "of at least one item", 0)
        self.drop_last = bool(drop_last)

    def __len__(self) -> int:
        new = int(self._groups.sizes[0])
        return new // self._fresh if self.drop_last else -(-new // self._fresh)

    def _batches(self, first: int, stop: int) -> Ints:
        steps = stop - first
        fresh = self._stream(0, self.epoch, np.arange(self._fresh * first, self._fresh * stop)).reshape(steps, -1)
        if not self.replayed:
            return fresh
        done = self.epoch * len(self)  # the old stream goes on from epoch to epoch
        old = self._stream(1, 0, np.arange(self.replayed * (done + first), self.replayed * (done + stop)))
        return np.concatenate((old.reshape(steps, -1), fresh), axis=1)

    def _stream(self, group: int, first_turn: int, positions: Ints) -> Ints:
        size = int(self._groups.sizes[group])
        turn, place = positions // size, positions % size
        found = np.empty_like(positions)
        for one in np.unique(turn).tolist():
            here = turn == one
            order = permutation(size, self.seed, "replay", group, first_turn + one)
            found[here] = self._groups.items(group, order(place[here]))
        return found

    def _identity(self) -> dict[str, Any]:
        sizes = self._groups.sizes.tolist()
        return {**super()._identity(), "sizes": sizes, "batch": [self._fresh, self.replayed]}
