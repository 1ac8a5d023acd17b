"""New tasks with earlier ones rehearsed at a rate that falls with their age (paper 59, arXiv 2401.10393)."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, Literal

import numpy as np

from .. import checks
from ._base import StreamSampler
from ._groups import Groups
from ._hash import Ints, below, key_of, uniform
from .permutation import permutation

Kind = Literal["power", "exponential", "uniform", "none"]
KINDS = ("power", "exponential", "uniform", "none")


def rehearsal_weights(phase: int, alpha: float = 1.0, kind: Kind = "power") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Shares of the tasks 0 to ``phase - 1`` while task ``phase`` is learned; their sum is 1, or 0 for ``none``.

    ``power``: ``age^-alpha`` with the age 1 for the task before; ``exponential``: ``exp(1 - age)``; ``uniform``.
    """
    age = np.arange(phase, 0, -1, dtype=np.float64)
    if kind == "none" or not phase:
        return np.zeros(phase)
    shares = {"power": age**-alpha, "exponential": np.exp(1 - age), "uniform": np.ones_like(age)}[kind]
    found: np.ndarray[Any, np.dtype[np.float64]] = shares / shares.sum()
    return found


class PowerLawRehearsalSampler(StreamSampler):
    """An epoch of phase t: every item of task t once, and ``round(rho n_t)`` draws from earlier tasks, mixed at random.

    A rehearsed item's task is drawn with `rehearsal_weights`, the item uniformly (it may come twice). Call
    ``set_phase(t)`` when task t begins and ``set_epoch`` before every epoch.

    Args:
        tasks: datasets or lengths, one a task, of their concatenation; with ``labelled=True`` the task of every item.
        alpha: exponent of the age.
        rho: rehearsed items per new one.
        kind: the distribution over earlier tasks.
        seed, rank, world_size, batch_size, drop_last: see `StreamSampler`.

    Raises:
        ValueError, TypeError: naming `alpha`, `rho`, `kind`, `tasks`.

    Example:
        >>> from w2s_fast.data import PowerLawRehearsalSampler
        >>> sampler = PowerLawRehearsalSampler([100, 100, 100], rho=0.5)
        >>> sampler.set_phase(2)
        >>> drawn = list(sampler)
        >>> len(drawn), sum(index >= 200 for index in drawn)
        (150, 100)
    """

    def __init__(
        self, tasks: Sequence[Sized | int] | Any, *, labelled: bool = False, alpha: float = 1.0, rho: float = 0.5,
        kind: Kind = "power", seed: int = 0, rank: int | None = None, world_size: int | None = None,
        batch_size: int = 1, drop_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(seed=seed, rank=rank, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        make = Groups.labelled if labelled else Groups.consecutive
        self._groups = make(self._op, "tasks", tasks)
        if (self._groups.sizes == 0).any():
            checks.fail(self._op, "tasks", "of at least one item each", self._groups.sizes.tolist())
        self.alpha = checks.number(self._op, "alpha", alpha, low=0.0)
        self.rho = checks.number(self._op, "rho", rho, low=0.0)
        checks.choice(self._op, "kind", kind, KINDS)
        self.kind: Kind = kind
        self.phase = 0

    def set_phase(self, phase: int) -> None:
        """Task ``phase`` (from 0) is the new one from the next epoch on.

        Raises:
            ValueError, TypeError: naming `phase`.
        """
        checks.integer(self._op, "phase", phase, low=0, high=len(self._groups) - 1)
        if phase != self.phase:
            self.phase, self._position, self._resumed = phase, 0, False
            self._version += 1

    @property
    def _new(self) -> int:
        return int(self._groups.sizes[self.phase])

    def _count(self) -> int:
        rehearsed = self.phase > 0 and self.kind != "none"
        return self._new + (int(np.floor(self.rho * self._new + 0.5)) if rehearsed else 0)

    def _at(self, positions: Ints) -> Ints:
        key = key_of(self.seed, "rehearsal", self.phase, self.epoch)
        places = permutation(self._count(), key, "order")(positions)
        found, new = np.empty_like(places), places < self._new
        found[new] = self._groups.items(self.phase, places[new])
        old = places[~new]
        edges = np.cumsum(rehearsal_weights(self.phase, self.alpha, self.kind))
        if len(old):
            drawn = np.searchsorted(edges, uniform(key_of(key, "task"), old) * edges[-1], side="right")
            drawn, rehearsed = np.minimum(drawn, self.phase - 1), np.empty_like(old)
            for task in np.unique(drawn).tolist():
                here = drawn == task
                numbers = below(key_of(key, "item", task), old[here], int(self._groups.sizes[task]))
                rehearsed[here] = self._groups.items(task, numbers)
            found[~new] = rehearsed
        return found

    def _identity(self) -> dict[str, Any]:
        rule = [self._groups.sizes.tolist(), self.alpha, self.rho, self.kind]
        return {**super()._identity(), "rule": rule}

    def _more_state(self) -> dict[str, Any]:
        return {"phase": self.phase}

    def _load_more(self, state: dict[str, Any]) -> None:
        self.phase = state["phase"]
