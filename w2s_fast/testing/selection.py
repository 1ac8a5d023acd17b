"""Which of a long list of cases a test run takes: some in `make test`, all in `make test-full`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")

#: Whether this run takes every case (the environment variable W2S_FAST_TEST_FULL=1).
FULL = os.environ.get("W2S_FAST_TEST_FULL") == "1"


def sampled(items: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """``count`` of the items in their order, the same for the same seed; every one under ``W2S_FAST_TEST_FULL=1``.

    Args:
        items: cases of a parametrized test, or draws of a fuzz.
        count: how many a normal run takes.
        seed: which ones; a fixed number, so that every process of a run collects the same tests.
    """
    found = list(items)
    if FULL or len(found) <= count:
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]


def amount(some: int, all_of_them: int) -> int:
    """``some`` in a normal run, ``all_of_them`` under ``W2S_FAST_TEST_FULL=1``: for draws of a fuzz."""
    return all_of_them if FULL else some
