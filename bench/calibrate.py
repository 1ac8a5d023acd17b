"""Times both ways of every dispatcher op of a family on small everyday calls: our kernel and plain PyTorch."""

from __future__ import annotations

import importlib
import pkgutil
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..calibration import Point, key, size
from ..library import Op
from .domain import Call, Domain

#: calls of each domain and dtype, spread over sizes up to what a few rows of a vocabulary take
DRAWS = 6
MOST_FLOPS, MOST_ELEMENTS = 1e8, 4e6
#: interleaved rounds of each call; plain PyTorch is believed by the better of its rounds but for the luckiest
ROUNDS, SECONDS = 5, 1e-3

Recorded = tuple[Op, tuple[Any, ...]]


def families() -> list[str]:
    """The families that have domains."""
    folder = importlib.import_module(".domains", __package__)
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def _calls(domain: Domain) -> Iterator[Call]:
    """The same calls on every machine."""
    for dtype in domain.dtypes:
        rng, found = random.Random(f"{domain.op}-{dtype}"), 0
        for _ in range(1000):
            call = replace(domain.draw(rng), dtype=dtype, padded=False, gradient=bool(domain.trained))
            if domain.flops(call.sizes) <= MOST_FLOPS and domain.elements(call.sizes) <= MOST_ELEMENTS:
                yield call
                found += 1
                if found == DRAWS:
                    break


@contextmanager
def _recording(seen: list[Recorded]) -> Iterator[None]:
    """Every call of a dispatcher op inside, forward and backward."""
    original = Op.run

    def run(self: Op, backend: str, flat: tuple[Any, ...]) -> Any:
        seen.append((self, flat))
        return original(self, backend, flat)

    Op.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Op.run = original  # type: ignore[method-assign]


def _time(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _ratio(ways: tuple[Callable[[], Any], Callable[[], Any]]) -> float:
    """Time of plain PyTorch over ours, the upper quartile of interleaved rounds."""
    counts = []
    for way in ways:
        way()
        counts.append(max(1, min(int(SECONDS / ROUNDS / max(_time(way, 1), 1e-7)), 200)))
    rounds = []
    for _ in range(ROUNDS):
        ours, plain = (_time(way, count) for way, count in zip(ways, counts, strict=True))
        rounds.append(plain / ours)
    return statistics.quantiles(rounds, n=4, method="inclusive")[2]


def measure(family: str) -> dict[str, list[Point]]:
    """Points of every dispatcher op that the family's calls reach and that has a C++ kernel."""
    found: dict[str, list[Point]] = {}
    for domain in importlib.import_module(f".domains.{family}", __package__).DOMAINS:
        for number, call in enumerate(_calls(domain)):
            inputs = call.inputs(torch.Generator().manual_seed(number), torch.device("cpu"))
            seen: list[Recorded] = []
            with _recording(seen), torch.inference_mode(False), torch.enable_grad():
                call.ways()["ours"](*inputs)
            once = {(op.name, key(flat)): (op, flat) for op, flat in seen if op.has_cpp()}
            for (name, signature), (op, flat) in once.items():
                with torch.inference_mode(False), torch.no_grad():
                    ratio = _ratio((lambda o=op, f=flat: o.kernel(f), lambda o=op, f=flat: o.plain(f)))  # type: ignore[misc]
                rows, elements = size(flat)
                point = Point(signature, rows.bit_length(), elements.bit_length(), round(ratio, 3))
                found.setdefault(name, []).append(point)
    return found
