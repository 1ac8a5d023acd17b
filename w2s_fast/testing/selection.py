"""Which of a long list of cases a test run takes: some in `make test`, all in `make test-full`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Iterable
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


def covering(
    items: Iterable[Item], kinds: Callable[[Item], Iterable[Hashable]], count: int = 0, seed: int = 0
) -> list[Item]:
    """Some of the items in their order, among them one of every kind; all of them under ``W2S_FAST_TEST_FULL=1``.

    Args:
        items: cases of a parametrized test.
        kinds: what an item stands for, say its op and dtype: no kind that occurs among ``items`` is left out.
        count: how many a normal run takes at least; what the kinds leave free is drawn.
        seed: which ones; tests of the same items take different ones with different seeds.
    """
    found = list(items)
    if FULL:
        return found
    order = random.Random(seed).sample(range(len(found)), len(found))
    seen: set[Hashable] = set()
    taken: list[int] = []
    free: list[int] = []
    for index in order:
        new = set(kinds(found[index])) - seen
        seen |= new
        (taken if new else free).append(index)
    return [found[i] for i in sorted(taken + free[: max(0, count - len(taken))])]


def amount(some: int, all_of_them: int) -> int:
    """``some`` in a normal run, ``all_of_them`` under ``W2S_FAST_TEST_FULL=1``: for draws of a fuzz."""
    return all_of_them if FULL else some
