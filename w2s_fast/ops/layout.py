"""How the kernels want a tensor to lie: the one place where the public functions copy what lies otherwise."""

from __future__ import annotations

from torch import Tensor


def unit_stride(t: Tensor) -> Tensor:
    """``t`` with its last dimension contiguous; other strides are free."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def separate_rows(t: Tensor) -> Tensor:
    """A vector or matrix with its last dimension contiguous and rows that do not overlap."""
    fine = t.stride(-1) == 1 or t.shape[-1] <= 1
    return t if fine and (t.ndim < 2 or t.shape[0] <= 1 or t.stride(0) >= t.shape[1]) else t.contiguous()
