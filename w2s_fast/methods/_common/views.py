"""Random views of inputs: small motions of pictures, noise, and several views as one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

#: ``view(x, generator)``: a randomly changed copy of a batch; the generator is on the CPU.
View = Callable[[Tensor, torch.Generator], Tensor]


def noisy(x: Tensor, generator: torch.Generator, size: float = 0.1) -> Tensor:
    """Gaussian noise of this standard deviation added."""
    return x + size * torch.randn(x.shape, generator=generator).to(x)


def moved_about(
    x: Tensor, generator: torch.Generator, *, angle: float = 0.15, shift: float = 0.1, scale: float = 0.05
) -> Tensor:
    """Pictures ``[N, C, H, W]``, each turned, shifted and scaled about its centre; what comes in is zero.

    Args:
        angle: largest, in radians.
        shift: largest, as a share of half a side.
        scale: largest relative change of the size.
    """
    turn, across, down, size = (2 * torch.rand(4, len(x), generator=generator) - 1).unbind(0)
    c, s = (angle * turn).cos() * (1 + scale * size), (angle * turn).sin() * (1 + scale * size)
    rows = torch.stack((c, -s, shift * across)), torch.stack((s, c, shift * down))
    grid = affine_grid(torch.stack(rows).permute(2, 0, 1).to(x), list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False)


def default_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures are `moved_about`, with a little noise; anything else gets noise of 0.1."""
    return noisy(moved_about(x, generator), generator, 0.02) if x.ndim == 4 else noisy(x, generator)


def two(x: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """Two views of every row, one batch behind the other: ``[2 N, ...]``."""
    return torch.cat((view(x, generator), view(x, generator)))
