"""Two-dimensional data for the diffusion methods: two moons, a small network of a point and a time, a distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


def moons(count: int, generator: torch.Generator, second: float = 0.5) -> Tensor:
    """Two half circles around 0 with noise, ``[count, 2]``; ``second`` is the share of the points on the second."""
    angle = math.pi * torch.rand(count, generator=generator)
    where = (torch.rand(count, generator=generator) < second).float()
    x = angle.cos() + where * (1 - 2 * angle.cos()) - 0.5
    y = angle.sin() + where * (0.5 - 2 * angle.sin()) - 0.25
    return 1.2 * torch.stack((x, y), 1) + 0.1 * torch.randn(count, 2, generator=generator)


class TimeMlp(nn.Module):
    """A residual MLP of a point ``[B, 2]`` and a time ``[B]`` of order 1, to ``[B, 2]``."""

    frequency: Tensor

    def __init__(self, width: int = 128, depth: int = 2, octaves: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(2 + 2 * octaves, width)
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.last = nn.Linear(width, 2)
        self.register_buffer("frequency", 0.5 * math.pi * 2.0 ** torch.arange(octaves))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        h = self.first(torch.cat((x, angle.sin(), angle.cos()), 1))
        for layer in self.hidden:
            h = h + layer(silu(h))
        made: Tensor = self.last(silu(h))
        return made


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256) -> float:
    """Root mean square over directions of the 2-Wasserstein distance of the projections; equal counts ``[n, 2]``."""
    angle = math.pi * torch.arange(directions) / directions
    projection = torch.stack((angle.cos(), angle.sin()))
    first, second = ((cloud @ projection).sort(0).values for cloud in (a, b))
    return (first - second).square().mean().sqrt().item()
