"""relu_rows: linear upper bounds taken back through a ReLU over a box, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


class ReluRows(NamedTuple):
    """Rows ``[M, B, N]`` before the ReLU, and what they add to the bound, ``[M, B]``."""

    rows: Tensor
    total: Tensor


class ReluRowsGradients(NamedTuple):
    """Each like its argument, ``[0]`` where not wanted."""

    da: Tensor
    dlower: Tensor
    dupper: Tensor


class Lines(NamedTuple):
    """``low x <= relu(x) <= slope x + intercept``; and the ends ``left <= 0``, ``top > left`` that they come of."""

    low: Tensor
    slope: Tensor
    intercept: Tensor
    left: Tensor
    top: Tensor


def lines(lower: Tensor, upper: Tensor) -> Lines:
    """The lines over a box: above the secant, below 1 or 0, whichever leaves the smaller area."""
    left, right = lower.clamp_max(0), upper.clamp_min(0)
    top = torch.maximum(right, left + 1e-8)
    slope = top / (top - left)
    return Lines((top > -left).to(slope.dtype), slope, -left * slope, left, top)


def relu_rows(a: Tensor, lower: Tensor, upper: Tensor) -> ReluRows:
    """``a . relu(x) <= rows . x + total`` for every x of the box ``[B, N]``, a row of each sample at a time.

    rows is ``a slope`` where a > 0 and ``a low`` elsewhere, total the sum of ``max(a, 0) intercept``.
    """
    wide = accumulate_dtype(a)
    found = lines(lower.to(wide), upper.to(wide))
    x = a.to(wide)
    rows = x * torch.where(x > 0, found.slope, found.low)
    return ReluRows(rows.to(a.dtype), (x.clamp_min(0) * found.intercept).sum(2))


def relu_rows_backward(
    grad: Tensor, more: Tensor, a: Tensor, lower: Tensor, upper: Tensor, need_a: bool, need_box: bool
) -> ReluRowsGradients:
    """Gradients of a, lower and upper from those of rows (``grad``) and total (``more``); ``low`` has none.

    With w = top - left: ``dslope = sum_m max(a, 0) grad``, ``dintercept = sum_m max(a, 0) more``, and slope = top / w,
    intercept = -left slope. top is upper where that is above left and 0, else it goes with left.
    """
    wide = accumulate_dtype(a)
    low, high = lower.to(wide), upper.to(wide)
    found, x, g, m = lines(low, high), a.to(wide), grad.to(wide), more.to(wide).unsqueeze(2)
    none = a.new_empty((0,))
    da = dlower = dupper = none
    if need_a:
        da = torch.where(x > 0, g * found.slope + m * found.intercept, g * found.low).to(a.dtype)
    if need_box:
        up = x.clamp_min(0)
        of_slope, of_intercept = (up * g).sum(0), (up * m).sum(0)
        width = found.top - found.left
        to_top = (of_intercept * found.left - of_slope) * found.left / (width * width)
        to_left = (of_slope - of_intercept * found.left) * found.slope / width - of_intercept * found.slope
        apart = high.clamp_min(0) > found.left + 1e-8
        dlower = torch.where(low <= 0, torch.where(apart, to_left, to_left + to_top), 0.0).to(a.dtype)
        dupper = torch.where(apart & (high >= 0), to_top, 0.0).to(a.dtype)
    return ReluRowsGradients(da, dlower, dupper)
