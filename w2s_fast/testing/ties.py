"""Logits whose nucleus ends at top_p exactly: what rounding would decide if nobody did."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tie(NamedTuple):
    """Rows of logits, the top_p at which each has a prefix of exactly that mass, and the tokens of that prefix.

    Fields: logits ``[R, V]`` float64 (values of float32), -inf where a row has fewer tokens; kept ``[R, V]`` bool;
    masses, integers proportional to the probabilities; exact, whether all tokens of a row are equal.
    """

    name: str
    logits: Tensor
    top_p: float
    kept: Tensor
    masses: list[list[int]]
    exact: bool


_FEW = 40  # unequal tokens behind the boundary: float32 sums of more are off by as much as the slack


def _row(rng: random.Random, numerator: int, denominator: int, times: int, equal: bool) -> tuple[list[int], int]:
    """Falling integer masses of which the first are numerator / denominator of all; and how many those are."""
    front, back = _falling(rng, numerator * times), (denominator - numerator) * times
    rest = [front[-1]] * (back // front[-1]) + [back % front[-1]] * (back % front[-1] > 0)
    if equal or len(rest) > _FEW:
        return [1] * (denominator * times), numerator * times
    return front + rest, len(front)


def _falling(rng: random.Random, total: int) -> list[int]:
    """``total`` as a sum of a few falling parts."""
    parts = []
    while total:
        part = rng.randint(max(1, total // 3), total)
        parts.append(part)
        total -= part
    return sorted(parts, reverse=True)


def nucleus_ties(rng: random.Random, count: int, rows: int) -> Iterator[Tie]:
    """``count`` fractions with ``rows`` rows each: equal tokens, or integers' logarithms; shuffled, shifted, padded."""
    for index in range(count):
        denominator = rng.randint(2, 180)
        numerator = rng.randint(1, denominator - 1)
        equal = index % 2 == 0
        made = [_row(rng, numerator, denominator, rng.randint(1, 8), equal) for _ in range(rows)]
        width = max(len(masses) for masses, _ in made) + rng.randint(0, 20)
        logits = torch.full((rows, width), -math.inf, dtype=torch.float64)
        kept = torch.zeros(rows, width, dtype=torch.bool)
        placed = [[0] * width for _ in range(rows)]
        for r, (masses, k) in enumerate(made):
            shift = 0.0 if not equal else rng.choice((0.0, 3.25, -50.0, 1024.0))
            columns = rng.sample(range(width), len(masses))
            # equal masses lie in index order, so that the prefix is the first of them
            at = 0
            while at < len(masses):
                end = at
                while end < len(masses) and masses[end] == masses[at]:
                    end += 1
                columns[at:end] = sorted(columns[at:end])
                at = end
            value = (torch.tensor(masses, dtype=torch.float64).log() + shift).float().double()
            where = torch.tensor(columns)
            logits[r, where] = value
            kept[r, where[:k]] = True
            for column, mass in zip(columns, masses, strict=True):
                placed[r][column] = mass
        name = f"{numerator}/{denominator} {'equal' if equal else 'logarithms'} {[len(m) for m, _ in made]}"
        yield Tie(name, logits, numerator / denominator, kept, placed, equal)
