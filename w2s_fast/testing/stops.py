"""A training that is stopped from outside, for tests that go on from its checkpoint."""

from __future__ import annotations


class Stop(Exception):
    """Raised by `Ticks` where the training is to stop."""


class Ticks:
    """What a training gets as ``tick``: keeps the losses that it is told, and stops at the ``stop``-th (0: never)."""

    def __init__(self, stop: int = 0) -> None:
        self.told: list[float] = []
        self.stop = stop

    def __call__(self, value: float) -> None:
        self.told.append(value)
        if len(self.told) == self.stop:
            raise Stop
