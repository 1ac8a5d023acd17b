"""Boxes in two forms, (lower, upper) and (centre, radius), and rounding outward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def center_radius(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre ``l + (u - l) / 2``, which is exactly l where l = u, and radius ``(u - l) / 2``."""
    half = (upper - lower) * 0.5
    return lower + half, half


def unit(dtype: torch.dtype) -> float:
    """Half the distance of 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def outward(x: Tensor, dtype: torch.dtype, lower: bool) -> Tensor:
    """float64 ``x`` in ``dtype``, rounded towards -infinity (``lower``) or +infinity."""
    y = x.to(dtype)
    if dtype == torch.float64:
        return y
    end = torch.full_like(y, -torch.inf if lower else torch.inf)
    beyond = y.double() > x if lower else y.double() < x
    return torch.where(beyond, torch.nextafter(y, end), y)


def sound_bounds(center: Tensor, radius: Tensor, slack: float, limit: float = torch.inf) -> tuple[Tensor, Tensor]:
    """``center -+ radius``, widened by ``slack`` of both; unbounded where anything overflowed or was NaN."""
    radius = radius * (1 + 4 * slack) + center.abs() * slack + 1e-300
    known = (center.abs() + radius < torch.inf) & (radius < limit)
    return torch.where(known, center - radius, -torch.inf), torch.where(known, center + radius, torch.inf)


def spread_limit(spread: float, dtype: torch.dtype) -> float:
    """A radius from which on partial sums of another evaluation may overflow; see csrc/cpu/interval_bounds."""
    return min(spread, 1.0) * torch.finfo(dtype).max / 2 if spread > 0 else torch.inf


def sound_operand(
    a: Tensor, b: Tensor, bounds: bool, terms: int, spread: float = 0.0
) -> tuple[Tensor, Tensor, float]:
    """float64 centre, and a radius that also covers what rounding does to a product of ``terms`` terms; and gamma.

    ``spread``: relative error of every term that the radius covers besides.
    """
    a, b, u = a.double(), b.double(), unit(torch.float64)
    gamma = (terms + 2) * u * 1.01
    center = a + (b - a) * 0.5 if bounds else a
    radius = torch.maximum(b - center, center - a) if bounds else b
    spread = spread * (1 + 8 * u)
    grown = radius * (1 + 4 * u + spread) + center.abs() * (gamma + spread) + torch.finfo(torch.float64).tiny
    return center, torch.where((center == 0) & (radius == 0), 0.0, grown), gamma


@contextmanager
def without_tf32(like: Tensor) -> Iterator[None]:
    """TF32 off on a GPU: its 2^-11 would move a bound by more than float32 rounding ever does."""
    if like.device.type != "cuda" or torch.compiler.is_compiling():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
