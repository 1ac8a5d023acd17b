"""dispersion: how far the softmax of a row is from uniform, by its variance and by its entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


class _Moments(NamedTuple):
    """Of d ``[n, C]``, logits less the row's largest: e^d, its sum S, ``sum e^{2 d} / S^2`` and ``sum d e^d / S``."""

    d: Tensor
    e: Tensor
    sum: Tensor
    square: Tensor
    product: Tensor


def _moments(logits: Tensor) -> _Moments:
    z = logits.to(accumulate_dtype(logits))
    d = z - z.amax(1, keepdim=True)
    e = d.exp()
    s = e.sum(1, keepdim=True)
    product = torch.where(e > 0, d * e, 0.0).sum(1, keepdim=True) / s
    return _Moments(d, e, s, (e / s).square().sum(1, keepdim=True), product)


def dispersion(logits: Tensor) -> Tensor:
    """``[n, 2]`` of the softmax p of logits ``[n, C]``: each 0 where p is uniform and 1 where it is one-hot.

    ``(sum p^2 - 1 / C) / (1 - 1 / C)`` and ``1 - H / log C``, H the entropy. float32, float64 if the logits are.
    """
    at, count = _moments(logits), logits.shape[1]
    variance = (at.square - 1 / count) / (1 - 1 / count)
    return torch.cat((variance, 1 - (at.sum.log() - at.product) / math.log(count)), 1)


def dispersion_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """``p_i (2 g_0 (p_i - sum p^2) / (1 - 1 / C) + g_1 (log p_i + H) / log C)``, 0 where p_i is, of grad ``[n, 2]``."""
    at, count = _moments(logits), logits.shape[1]
    first, second = grad.to(at.e.dtype).split(1, 1)
    p = at.e / at.sum
    # log p + H is d - sum d e^d / S
    slope = first * (2 / (1 - 1 / count)) * (p - at.square) + second / math.log(count) * (at.d - at.product)
    return torch.where((at.e == 0) & ~at.sum.isnan(), 0.0, p * slope).to(logits.dtype)
