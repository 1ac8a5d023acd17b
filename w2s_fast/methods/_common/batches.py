"""Batches of a dataset in an order that is a function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, default_collate

from ... import checks
from ...data import StreamBatchSampler
from ...data._hash import Ints
from ...data.permutation import permutation
from .place import ALONE, Place


class ShuffledBatches(StreamBatchSampler):
    """Every item once an epoch, in full batches of all processes together; what is left over waits for another order.

    Of fewer items than a batch has, all make one.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.count = count
        size = max(world_size, min(batch_size, count) // world_size * world_size)
        super().__init__(size, seed=seed, rank=rank, world_size=world_size)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "count": self.count, "batch_size": self.global_batch_size}

    def _batches(self, first: int, stop: int) -> Ints:
        size = self.global_batch_size
        order = permutation(self.count, self.seed, self.epoch, "shuffled")
        return order(np.arange(first * size, stop * size, dtype=np.int64)).reshape(-1, size)

    def __len__(self) -> int:
        return self.count // self.global_batch_size


def sized(data: Any) -> int:
    """How many items a map-style dataset has, at least one."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        kind = type(data).__name__
        checks.fail("methods", "data", "map-style, with a length and items by number", kind, error=TypeError)
    if not len(data):
        checks.fail("methods", "data", "of at least one item", 0)
    return len(data)


def shuffled(
    data: Any, batch_size: int, *, seed: int = 0, where: Place | None = None, collate: Callable[..., Any] | None = None
) -> DataLoader[Any]:
    """A DataLoader over a map-style dataset with `ShuffledBatches`; this process's part of every batch.

    Raises:
        ValueError, TypeError: naming `data`.
    """
    where = where or ALONE
    sized(data)
    batches = ShuffledBatches(len(data), batch_size, seed=seed, rank=where.rank, world_size=where.world)
    return DataLoader(data, batch_sampler=batches, collate_fn=collate)


class Beside:
    """Batches of a second dataset by the number of the step: a resumed training has no state of them to keep."""

    def __init__(self, data: Any, batch_size: int, *, seed: int = 0, where: Place | None = None) -> None:
        where = where or ALONE
        self.data = data
        self.sampler = ShuffledBatches(len(data), batch_size, seed=seed, rank=where.rank, world_size=where.world)

    def at(self, step: int) -> Any:
        """This process's part of the batch of a step, collated."""
        epoch, number = divmod(step, len(self.sampler))
        self.sampler.set_epoch(epoch)
        rows = self.sampler._batches(number, number + 1)[0]
        return default_collate([self.data[int(i)] for i in rows[self.sampler.rank :: self.sampler.world_size]])
