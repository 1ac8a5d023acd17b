"""An affine map of each channel of a box, and the statistics that batch-norm takes from clean activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .boxes import outward, unit


def _axes(x: Tensor) -> tuple[int, ...]:
    return (1, -1) + (1,) * (x.ndim - 2)


class Affine(NamedTuple):
    """Lower and upper bounds."""

    low: Tensor
    high: Tensor


class AffineGradients(NamedTuple):
    """Each like its argument."""

    dlower: Tensor
    dupper: Tensor
    dscale: Tensor
    dshift: Tensor


class Moments(NamedTuple):
    """Of each channel."""

    mean: Tensor
    var: Tensor


def interval_affine(
    lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor, relu: bool, sound: bool
) -> Affine:
    """``s x + t`` of both bounds, exchanged where s < 0, through ReLU if ``relu``.

    ``sound`` computes in float64, covers its rounding error too and rounds outward.
    """
    wide = torch.float64 if sound else accumulate_dtype(lower)
    s, t = (v.to(wide).reshape(_axes(lower)) for v in (scale, shift))
    low, high = lower.to(wide), upper.to(wide)
    first, second = torch.where(s >= 0, low, high), torch.where(s >= 0, high, low)
    ends = []
    for x, down in ((first, True), (second, False)):
        end = x * s + t
        if sound:
            size = (x * s).abs() + t.abs()
            slack = size * (4 * unit(wide)) + 1e-300
            moved = end - slack if down else end + slack
            end = torch.where(size < torch.inf, moved, -torch.inf if down else torch.inf)
        end = end.relu() if relu else end
        ends.append(outward(end, lower.dtype, down) if sound else end.to(lower.dtype))
    return Affine(ends[0], ends[1])


def interval_affine_backward(
    grad_lower: Tensor, grad_upper: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, low: Tensor, high: Tensor,
    relu: bool,
) -> AffineGradients:  # fmt: skip
    """Gradients of lower, upper, scale and shift; ``low`` and ``high`` are the outputs."""
    wide = accumulate_dtype(lower)
    g, h, x, y = (v.to(wide) for v in (grad_lower, grad_upper, lower, upper))
    if relu:
        g, h = torch.where(low > 0, g, 0), torch.where(high > 0, h, 0)
    s = scale.to(wide).reshape(_axes(lower))
    to_lower, to_upper = torch.where(s >= 0, g, h), torch.where(s >= 0, h, g)
    axes = [0, *range(2, lower.ndim)]
    dscale, dshift = (to_lower * x + to_upper * y).sum(axes), (g + h).sum(axes)
    bounds = (to_lower * s).to(lower.dtype), (to_upper * s).to(lower.dtype)
    return AffineGradients(*bounds, dscale.to(scale.dtype), dshift.to(scale.dtype))


def interval_batchnorm_stats(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, from float64 sums."""
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.double(), axes, correction=0)
    wide = accumulate_dtype(x)
    return Moments(mean.to(wide), variance.to(wide))


def interval_batchnorm_stats_backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """``(g_mean + 2 g_var (x - mean)) / count``."""
    axes, wide = _axes(x), accumulate_dtype(x)
    count = x.numel() // x.shape[1]
    g, h, center = (v.to(wide).reshape(axes) for v in (grad_mean, grad_var, mean))
    return ((g + 2 * h * (x.to(wide) - center)) / count).to(x.dtype)
