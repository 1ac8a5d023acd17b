"""A new random part of the data in every epoch (RS2, paper 45, arXiv 2305.18424)."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from .. import checks
from ._base import StreamSampler
from ._groups import Groups
from ._hash import Ints
from .permutation import permutation


class RepeatedRandomSubsetSampler(StreamSampler):
    """``floor(fraction * n)`` indices an epoch, other ones in the next (call ``set_epoch``).

    Without replacement the epochs walk through one random order in consecutive parts; when fewer indices remain than
    an epoch needs, they are left out and another order begins. With replacement (over epochs) each epoch is an
    independent subset; no index comes twice in one epoch. ``labels`` makes it stratified: of every class its rounded
    share, at least one item. Compute the learning rate for ``epochs * len(sampler)`` indices in all, so that it decays
    fully in the shorter run.

    Args:
        n: items of the dataset, or the dataset.
        fraction: in (0, 1], of at least one item.
        replacement: over epochs.
        labels: class of every item ``[n]``, for stratified parts; the sampler then holds 8 bytes an item.
        seed, rank, world_size, batch_size, drop_last: see `StreamSampler`.

    Raises:
        ValueError, TypeError: naming `n`, `fraction`, `labels`.

    Example:
        >>> from w2s_fast.data import RepeatedRandomSubsetSampler
        >>> sampler, seen = RepeatedRandomSubsetSampler(100, 0.25), []
        >>> for epoch in range(4):
        ...     sampler.set_epoch(epoch)
        ...     seen += sampler
        >>> sorted(seen) == list(range(100))
        True
    """

    def __init__(
        self, n: Sized | int, fraction: float, *, replacement: bool = False, labels: Any = None, seed: int = 0,
        rank: int | None = None, world_size: int | None = None, batch_size: int = 1, drop_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(seed=seed, rank=rank, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        size = checks.integer(self._op, "n", len(n) if isinstance(n, Sized) else n, low=1)
        self.fraction = checks.number(self._op, "fraction", fraction, low=0.0, high=1.0, open_low=True)
        self.replacement = bool(replacement)
        if labels is None:
            self._groups = Groups.consecutive(self._op, "n", [size])
            self._parts = np.array([int(np.floor(self.fraction * size * (1 + 1e-12)))])
            if not self._parts[0]:
                checks.fail(self._op, "fraction", f"at least one of {size} items", fraction)
        else:
            self._groups = Groups.labelled(self._op, "labels", labels)
            if int(self._groups.sizes.sum()) != size:
                checks.fail(self._op, "labels", f"of {size} items", int(self._groups.sizes.sum()))
            shares = np.floor(self.fraction * self._groups.sizes + 0.5).astype(np.int64)
            self._parts = np.minimum(np.maximum(shares, 1), self._groups.sizes)

    def _count(self) -> int:
        return int(self._parts.sum())

    def _at(self, positions: Ints) -> Ints:
        if len(self._parts) == 1:
            return self._of_group(0, positions)
        places = permutation(self._count(), self.seed, "order", self.epoch)(positions)
        edges = np.cumsum(self._parts)
        group = np.searchsorted(edges, places, side="right")
        found = np.empty_like(positions)
        for one in np.unique(group).tolist():
            here = group == one
            found[here] = self._of_group(one, places[here] - (edges[one] - self._parts[one]))
        return found

    def _of_group(self, group: int, places: Ints) -> Ints:
        size, part = int(self._groups.sizes[group]), int(self._parts[group])
        turn, block = (self.epoch, 0) if self.replacement else divmod(self.epoch, size // part)
        order = permutation(size, self.seed, "subset", group, turn)
        return self._groups.items(group, order(places + block * part))

    def _identity(self) -> dict[str, Any]:
        parts = [self._groups.sizes.tolist(), self._parts.tolist(), self.replacement]
        return {**super()._identity(), "parts": parts}
