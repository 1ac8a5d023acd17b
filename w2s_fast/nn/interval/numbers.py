"""What the arguments of a layer say, for its bounds and for the way back: zeros on each side, the scale of a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def each(value: Any, count: int) -> list[int]:
    """One number an axis, of one for all or of one each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def sides_of(padding: Any, kernel: Any, dilation: Any) -> list[tuple[int, int]]:
    """Zeros before and after each axis."""
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in each(padding, len(kernel))]


def scale_of(norm: dict[str, Any], mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """s and t of ``s x + t``."""
    scale = torch.rsqrt(variance + norm["eps"])
    if norm["weight"] is not None:
        scale = scale * norm["weight"]
    shift = -mean * scale
    return scale, shift if norm["bias"] is None else shift + norm["bias"]
