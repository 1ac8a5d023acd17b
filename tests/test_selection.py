"""A normal run's part of a long list of cases leaves out no kind, and is the same in every process."""

from __future__ import annotations

import itertools

import pytest

from w2s_fast.testing import selection
from w2s_fast.testing.selection import covering

CASES = list(itertools.product(range(40), "ab", (True, False)))


@pytest.fixture(autouse=True)
def normal_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "FULL", False)


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_is_there(seed: int):
    found = covering(CASES, lambda case: [case[0], case[1:]], 50, seed)
    assert {case[0] for case in found} == set(range(40)) and len({case[1:] for case in found}) == 4
    assert len(found) == len(set(found)) == 50 and found == sorted(found, key=CASES.index)
    assert found == covering(CASES, lambda case: [case[0], case[1:]], 50, seed)
    fewest = covering(CASES, lambda case: [case[0]], 0, seed)
    assert len(fewest) == 40


def test_seeds_take_others_and_a_full_run_takes_all(monkeypatch: pytest.MonkeyPatch):
    taken = [set(covering(CASES, lambda case: [case[0]], 0, seed)) for seed in range(3)]
    assert len(set.union(*taken)) > 70
    monkeypatch.setattr(selection, "FULL", True)
    assert covering(CASES, lambda case: [case[0]]) == CASES
