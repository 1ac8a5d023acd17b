"""Sums over the bounds before a ReLU that the warm-up regularisers of fast certified training need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def interval_moments(lower: Tensor, upper: Tensor) -> Tensor:
    """float64 ``[9]``: sums over all entries of w, c, c^2, [a], c [a], c^2 [a], [d], c [d], c^2 [d].

    ``w = u - l``, ``c = (l + u) / 2``; [a]: active, l > 0; [d]: dead, u < 0.
    """
    low, high = lower.double(), upper.double()
    c = (low + high) * 0.5
    active, dead = (low > 0).double(), (high < 0).double()
    rows = [high - low, c, c * c, active, c * active, c * c * active, dead, c * dead, c * c * dead]
    return torch.stack([row.sum() for row in rows])


class MomentsGradients(NamedTuple):
    """Each like its argument."""

    dlower: Tensor
    dupper: Tensor


def interval_moments_backward(grad: Tensor, lower: Tensor, upper: Tensor) -> MomentsGradients:
    """Gradients of lower and upper; those of the counts are 0."""
    low, high, g = lower.double(), upper.double(), grad.double()
    c = (low + high) * 0.5
    active, dead = (low > 0).double(), (high < 0).double()
    half = 0.5 * (g[1] + g[4] * active + g[7] * dead) + c * (g[2] + g[5] * active + g[8] * dead)
    return MomentsGradients((half - g[0]).to(lower.dtype), (half + g[0]).to(upper.dtype))
