"""What every sampler here promises; see `StreamSampler`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from torch.utils.data import Sampler

from .. import checks
from ._hash import Ints

#: Indices that are computed at once.
CHUNK = 4096


def ranks_of_process_group() -> int:
    """Processes of torch.distributed's group; 1 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Contract:
    """Seed, epoch, place among the ranks, and the position from which an interrupted epoch goes on."""

    def __init__(self, seed: int, rank: int | None, world_size: int | None) -> None:
        self.seed = checks.integer(self._op, "seed", seed, low=0)
        if (rank is None) != (world_size is None):
            checks.fail(self._op, "rank", "given together with world_size", f"{rank} and {world_size}")
        self._told = world_size is not None
        self.world_size = 1 if world_size is None else checks.integer(self._op, "world_size", world_size, low=1)
        self.rank = 0 if rank is None else checks.integer(self._op, "rank", rank, low=0, high=self.world_size - 1)
        self.epoch = 0
        self._position = 0  # of all ranks together
        self._resumed = False
        self._version = 0  # a running iterator computes again what it has not given out when this changes

    @property
    def _op(self) -> str:
        return f"data.{type(self).__name__}"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration runs; the one it was in already leaves a loaded position as it is."""
        epoch = checks.integer(self._op, "epoch", int(epoch), low=0)
        if epoch != self.epoch:
            self.epoch, self._resumed = epoch, False
            self._version += 1
            self._restart()
            self._position = 0

    def _restart(self) -> None:
        """An epoch begins at its first position."""

    def _begin(self) -> int:
        if not self._told and ranks_of_process_group() > 1:
            self._must_be_told()
        if not self._resumed:
            self._restart()
            self._position = 0
        self._resumed = False
        return self._position

    def _must_be_told(self) -> NoReturn:
        checks.fail(
            self._op,
            "world_size",
            f"given with rank, since torch.distributed has {ranks_of_process_group()} processes",
            None,
            "Give rank=dist.get_rank(), world_size=dist.get_world_size() in a loop of your own, and rank=0, "
            "world_size=1 under accelerate or transformers' Trainer, which deal out the batches themselves.",
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same where a state is loaded."""
        return {"kind": type(self).__name__, "seed": self.seed}

    def state_dict(self, drawn: int | None = None) -> dict[str, Any]:
        """Where this sampler is, as numbers and lists.

        Args:
            drawn: what the training loop of this rank has taken in this epoch (indices, or batches of a batch sampler).
                Needed with DataLoader workers only, which fetch ahead: torchdata's StatefulDataLoader keeps the book
                itself, a plain DataLoader does not.
        """
        position = self._position
        if drawn is not None:
            position = checks.integer(self._op, "drawn", drawn, low=0) * self._stride
        return {**self._identity(), "epoch": self.epoch, "position": position, **self._more_state()}

    @property
    def _stride(self) -> int:
        """Positions that one element of a rank stands for."""
        return self.world_size

    def _more_state(self) -> dict[str, Any]:
        return {}

    def _load_more(self, state: dict[str, Any]) -> None:
        pass

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there; also with another number of ranks where the position divides."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                checks.fail(self._op, "state", f"of a sampler with {name} {value!r}", repr(state.get(name)))
        if state["position"] % self._stride:
            checks.fail(self._op, "state", f"at a multiple of {self._stride} positions", state["position"])
        self.epoch, self._position, self._resumed = state["epoch"], state["position"], True
        self._version += 1
        self._restart()
        self._load_more(state)

    def rewind(self) -> None:
        """Back to the start of a loaded epoch, keeping the rest of the state: for loops that skip by drawing again."""
        self._position, self._resumed = 0, False
        self._version += 1
        self._restart()


class StreamSampler(_Contract, Sampler[int]):
    """Base of the samplers of indices.

    1. The global order is a function of (seed, epoch, position); every rank computes the same one and takes the
       positions ``rank, rank + world_size, ...``, after the end was filled up from the beginning, or cut off
       (``drop_last``), to a multiple of ``world_size * batch_size``.
    2. ``set_epoch(e)`` as in torch's DistributedSampler.
    3. ``state_dict`` and ``load_state_dict`` go on in the middle of an epoch with the same remaining indices.
    4. Memory is O(1) in the number of items; an index costs the same at 10^4 and at 10^9 of them.

    Under accelerate or transformers' Trainer, which deal out batches themselves, leave rank and world_size at 0 and 1.
    """

    def __init__(
        self, *, seed: int, rank: int | None, world_size: int | None, batch_size: int = 1, drop_last: bool = False
    ) -> None:
        super().__init__(seed, rank, world_size)
        self.batch_size = checks.integer(self._op, "batch_size", batch_size, low=1)
        self.drop_last = bool(drop_last)

    @property
    def _unit(self) -> int:
        return self.world_size * self.batch_size

    def _count(self) -> int:
        """Global indices of this epoch, before filling up or cutting off."""
        raise NotImplementedError

    def _at(self, positions: Ints) -> Ints:
        """Dataset indices at increasing positions; fewer where the stream ends."""
        raise NotImplementedError

    def _fill(self, positions: Ints) -> Ints:
        """Positions beyond the end, which fill the last batch up, begin again."""
        return positions % max(1, self._count())

    def _rounded(self) -> int:
        count = self._count()
        return count // self._unit * self._unit if self.drop_last else -(-count // self._unit) * self._unit

    def __len__(self) -> int:
        return self._rounded() // self.world_size

    def __iter__(self) -> Iterator[int]:
        """The indices of this rank."""
        return self._run(self._begin())  # begun here, so that a state before the first index is right

    def _run(self, position: int) -> Iterator[int]:
        step = max(1, CHUNK // self._unit) * self._unit
        while position < (end := self._rounded()):  # which a change of weights may move
            stop = min(end, (position // step + 1) * step)
            places = np.arange(position + self.rank, stop, self.world_size, dtype=np.int64)
            version = self._version
            found = self._at(self._fill(places)).tolist()
            for index in found:
                position += self.world_size
                self._position = position
                yield index
                if version != self._version:
                    break
            else:
                if len(found) < len(places):
                    return


class StreamBatchSampler(_Contract, Sampler[list[int]]):
    """Base of the samplers of batches: `StreamSampler`'s contract, with positions that count global batches.

    ``batch_size`` is the number of indices of all ranks together; rank r gets those at r, r + world_size, ... of every
    global batch.
    """

    def __init__(self, batch_size: int, *, seed: int, rank: int | None, world_size: int | None) -> None:
        super().__init__(seed, rank, world_size)
        self.global_batch_size = checks.integer(self._op, "batch_size", batch_size, low=1)
        if batch_size % self.world_size:
            checks.fail(self._op, "batch_size", f"a multiple of the {self.world_size} ranks", batch_size)
        self.batch_size = batch_size // self.world_size  # accelerate reads this and drop_last
        self.drop_last = True

    @property
    def sampler(self) -> StreamBatchSampler:
        """Itself: accelerate hands ``set_epoch`` to the sampler of a batch sampler only."""
        return self

    @property
    def _stride(self) -> int:
        return 1

    def _batches(self, first: int, stop: int) -> Ints:
        """The global batches of these steps of this epoch, ``[stop - first, batch]``."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this rank."""
        return self._run(self._begin())

    def _run(self, step: int) -> Iterator[list[int]]:
        end = len(self)
        together = max(1, CHUNK // self.global_batch_size)
        while step < end:
            stop = min(end, step + together)
            for batch in self._batches(step, stop)[:, self.rank :: self.world_size].tolist():
                step += 1
                self._position = step
                yield batch
