"""Makes everyday calls of a family of ops, so that both ways of each kind of call are timed before anybody waits."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from .domain import Call, Domain

#: calls of each domain, dtype and kind of gradient, spread over sizes up to what a few rows of a vocabulary take
DRAWS = 6
MOST_FLOPS, MOST_ELEMENTS = 1e8, 4e6


def families() -> list[str]:
    """The families that have domains."""
    folder = importlib.import_module(".domains", __package__)
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def _calls(domain: Domain) -> Iterator[Call]:
    """The same calls on every machine."""
    for dtype in domain.dtypes:
        rng, found = random.Random(f"{domain.op}-{dtype}"), 0
        for _ in range(1000):
            call = replace(domain.draw(rng), dtype=dtype, padded=False)
            if domain.flops(call.sizes) <= MOST_FLOPS and domain.elements(call.sizes) <= MOST_ELEMENTS:
                yield call
                found += 1
                if found == DRAWS:
                    break


def measure(family: str) -> None:
    """Make each call: a kind of call is timed at its first."""
    for domain in importlib.import_module(f".domains.{family}", __package__).DOMAINS:
        for number, call in enumerate(_calls(domain)):
            inputs = call.inputs(torch.Generator().manual_seed(number), torch.device("cpu"))
            with torch.inference_mode(False), torch.enable_grad():
                call.ways()["ours"](*inputs)
