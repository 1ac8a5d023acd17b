"""The benchmark cases under pytest-benchmark: ``pytest bench/`` (hot cases), ``pytest bench/ --benchmark-json=...``.

The same registry as `w2s-fast bench`; there the comparison is better (interleaved rounds), here the history is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from w2s_fast.bench import timing
from w2s_fast.bench.case import Case, Unavailable, load
from w2s_fast.bench.harness import OURS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [
    pytest.param(case, name, id=f"{case.id}-{name}") for case in load(DEVICE.type) for name in (OURS, *case.providers)
]


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[tuple[Any, ...], ...]:
    def make(seed: int) -> tuple[Any, ...]:
        return case.inputs(torch.Generator(DEVICE).manual_seed(seed), DEVICE)

    count = timing.sets_needed(timing.tensor_bytes(make(0)), timing.last_level_cache(DEVICE))
    return tuple(make(seed) for seed in range(count))


def _callable(case: Case, name: str) -> Callable[..., Any]:
    if name == OURS:
        return case.ours
    try:
        return case.providers[name].make()
    except (Unavailable, ImportError) as error:
        pytest.skip(f"{name} cannot run here: {error}")


@pytest.mark.parametrize("case, name", PAIRS)
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    function, sets = _callable(case, name), _inputs(case)
    provider = case.providers.get(name)
    error = case.error(function(*sets[0]), case.reference(*sets[0]), provider.compare if provider else None)
    assert error <= 1.0, f"{name} is wrong: {error:.3g} times the tolerance"
    position = iter(range(10**9))

    def once() -> None:
        function(*sets[next(position) % len(sets)])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.extra_info["provider"] = case.id, name
    benchmark.pedantic(once, rounds=15, warmup_rounds=3)
