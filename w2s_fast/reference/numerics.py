"""Small numerics that the reference ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any of ``tensors`` is, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def log_sum_exp(x: Tensor) -> Tensor:
    """``log sum_v exp x_v`` over the last dimension, shifted by the maximum; -inf for a row of -inf, NaN for a NaN."""
    return torch.logsumexp(x, -1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` with equal entries giving exactly 0, equal infinities (a token both models mask) included."""
    return torch.where(a == b, 0.0, a - b)


def mass_before(p: Tensor) -> Tensor:
    """Exclusive cumulative sum over the last dimension: the mass of the entries before each."""
    total = p.cumsum(-1)
    return torch.cat((torch.zeros_like(total[..., :1]), total[..., :-1]), -1)


def unsort(mask: Tensor, order: Tensor) -> Tensor:
    """``mask`` of the sorted entries put back where ``order`` (the sort's indices) took them from."""
    return torch.zeros_like(mask).scatter(-1, order, mask)
