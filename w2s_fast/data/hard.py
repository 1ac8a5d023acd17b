"""Training on the batches of the highest loss (paper 55, arXiv 2304.03486)."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

import numpy as np
import torch

from .. import checks
from ._base import StreamBatchSampler, ranks_of_process_group
from ._hash import Ints
from .permutation import permutation


class HardBatchSampler(StreamBatchSampler):
    """The ``ceil(delta * batches)`` batches of the highest loss, the highest first.

    An epoch cuts a random order of the data into ``n // batch_size`` batches with numbers from 0 on. Forward all of
    them (`ranking` is the batch sampler for that), hand the losses to `update_losses`, then iterate. With
    ``reshuffle=False`` the batches stay the same and so do the losses of batches that were not ranked anew: rank with
    the training pass's own losses, at no cost. A batch without a loss counts as the hardest.

    Args:
        n: items of the dataset, or the dataset.
        batch_size: of all ranks together.
        delta: share of the batches in (0, 1].
        reshuffle: other batches every epoch, whose losses are unknown at first.
        seed, rank, world_size: see `StreamBatchSampler`.

    Raises:
        ValueError, TypeError: naming `n`, `delta`.

    Example:
        >>> from w2s_fast.data import HardBatchSampler
        >>> sampler = HardBatchSampler(100, 10, 0.3)
        >>> sampler.update_losses(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        >>> list(sampler)[0] == list(sampler.ranking())[9]
        True
    """

    def __init__(
        self, n: Sized | int, batch_size: int, delta: float, *, reshuffle: bool = True, seed: int = 0,
        rank: int | None = None, world_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size)
        self._n = checks.integer(self._op, "n", len(n) if isinstance(n, Sized) else n, low=batch_size)
        self.delta = checks.number(self._op, "delta", delta, low=0.0, high=1.0, open_low=True)
        self.batches = self._n // batch_size
        self.reshuffle = bool(reshuffle)
        self._losses = np.full(self.batches, math.inf)
        self._order = self._hardest()

    def _restart(self) -> None:
        if hasattr(self, "_order"):
            self._order = self._hardest()

    def set_epoch(self, epoch: int) -> None:
        """Batches of another epoch; with ``reshuffle`` their losses are unknown."""
        if epoch != self.epoch and self.reshuffle:
            self._losses[:] = math.inf
        super().set_epoch(epoch)

    def update_losses(self, batches: Any, losses: Any) -> None:
        """Losses of batches by their number, for the next iteration.

        Under torch.distributed all ranks call this together, each with batches of its own or with its share of the same
        ones; the mean of what was given for a batch counts, on all ranks.

        Raises:
            ValueError: naming `losses`, `batches`.
        """
        ids = torch.as_tensor(list(batches) if isinstance(batches, range) else batches).long().cpu().numpy()
        values = torch.as_tensor(losses).double().cpu().numpy()
        if ids.ndim != 1 or ids.shape != values.shape:
            checks.fail(self._op, "losses", f"one a batch, {ids.shape}", values.shape)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.batches):
            checks.fail(self._op, "batches", f"in [0, {self.batches})", [int(ids.min()), int(ids.max())])
        if np.isnan(values).any():
            checks.fail(self._op, "losses", "numbers", "NaN")
        total, count = np.zeros(self.batches), np.zeros(self.batches)
        np.add.at(total, ids, values)
        np.add.at(count, ids, 1)
        if ranks_of_process_group() > 1:
            total, count = _summed(np.stack((total, count)))
        given = count > 0
        self._losses[given] = total[given] / count[given]

    def ranking(self) -> list[list[int]]:
        """This rank's part of every batch of the epoch, in the order of their numbers: a ``batch_sampler``."""
        return [self._of(b)[self.rank :: self.world_size].tolist() for b in range(self.batches)]

    def chosen(self) -> list[int]:
        """Numbers of the batches that the present losses choose, the hardest first."""
        return [int(number) for number in self._hardest()]

    def __len__(self) -> int:
        return math.ceil(self.delta * self.batches * (1 - 1e-12))

    def _hardest(self) -> Ints:
        return np.argsort(-self._losses, kind="stable")[: len(self)].astype(np.int64)

    def _of(self, number: int) -> Ints:
        order = permutation(self._n, self.seed, "hard", self.epoch if self.reshuffle else 0)
        size = self.global_batch_size
        return order(np.arange(number * size, (number + 1) * size))

    def _batches(self, first: int, stop: int) -> Ints:
        return np.stack([self._of(int(number)) for number in self._order[first:stop]])

    def _identity(self) -> dict[str, Any]:
        rule = [self._n, self.global_batch_size, self.delta, self.reshuffle]
        return {**super()._identity(), "rule": rule}

    def _more_state(self) -> dict[str, Any]:
        return {"losses": self._losses.tolist(), "order": self._order.tolist()}

    def _load_more(self, state: dict[str, Any]) -> None:
        self._losses, self._order = np.array(state["losses"]), np.array(state["order"], dtype=np.int64)


def _summed(values: Any) -> Any:
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    sent = torch.from_numpy(values).to(device)
    dist.all_reduce(sent)
    return sent.cpu().numpy()
