"""Boxes and their exact images in rational arithmetic, for tests of sound rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Exact = list[list[list[Fraction]]]


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers drawn in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact_bounds(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor) -> Exact:
    """Both ends of every output as fractions: the attained extremes."""
    rows = []
    for low, high in zip(lower.tolist(), upper.tolist(), strict=True):
        row = []
        for w, shift in zip(weight.tolist(), bias.tolist(), strict=True):
            ends = [Fraction(shift), Fraction(shift)]
            for a, b, x in zip(low, high, w, strict=True):
                first, second = (a, b) if x >= 0 else (b, a)
                ends[0] += Fraction(x) * Fraction(first)
                ends[1] += Fraction(x) * Fraction(second)
            row.append(ends)
        rows.append(row)
    return rows


def assert_contains(found: Sequence[Tensor], exact: Exact) -> None:
    """Every exact end lies within the bounds ``(lower, upper)`` found."""
    low, high = (t.double().tolist() for t in found)
    for i, row in enumerate(exact):
        for j, (a, b) in enumerate(row):
            assert low[i][j] == -float("inf") or Fraction(low[i][j]) <= a, (i, j, low[i][j], float(a))
            assert high[i][j] == float("inf") or Fraction(high[i][j]) >= b, (i, j, high[i][j], float(b))


#: Boxes of two rows and k columns as (lower, width), by what is hard about them.
KINDS: dict[str, Callable[[torch.Generator, int], tuple[Tensor, Tensor]]] = {
    "random": lambda g, k: (random(g, 2, k), random(g, 2, k).abs() * 0.1),
    "point": lambda g, k: (random(g, 2, k), torch.zeros(2, k)),
    "cancelling": lambda g, k: (random(g, 2, k) * 1e6, random(g, 2, k).abs() * 1e-3),
    "denormal": lambda g, k: (random(g, 2, k) * 1e-41, random(g, 2, k).abs() * 1e-42),
    "huge": lambda g, k: (random(g, 2, k) * 1e30, random(g, 2, k).abs() * 1e28),
    "signed zeros": lambda g, k: (torch.zeros(2, k) * -1.0, random(g, 2, k).abs() * (torch.arange(k) % 2)),
    "mixed": lambda g, k: (random(g, 2, k) * 10.0 ** (torch.arange(k) % 50 - 25), random(g, 2, k).abs() * 1e-9),
}
