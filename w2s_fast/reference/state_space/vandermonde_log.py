"""Sums of powers, and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .s4d_conv import as_complex, like, powers


class VandermondeGradients(NamedTuple):
    """Each like its argument."""

    dc: Tensor
    dx: Tensor


def vandermonde_log(c: Tensor, x: Tensor, length: int) -> Tensor:
    """``2 Re sum_n c_n e^{x_n l}`` ``[C, H, length]`` for l from 0, of complex c ``[C, H, M, 2]`` and x ``[H, M, 2]``.

    With ``l = 64 q + r``, ``e^{x l} = e^{64 x q} e^{x r}``: sums in float32, float64 if c is; both powers in float64.
    """
    acc = accumulate_dtype(c)
    made = powers(as_complex(x, torch.float64), length)
    left = (2 * as_complex(c, torch.float64)[..., None] * made.coarse).to(made.to(acc).fine.dtype)
    fine = made.to(acc).fine
    rows = torch.cat((left.real, -left.imag), -2).mT  # in real numbers: half the products
    return (rows @ torch.cat((fine.real, fine.imag), -2)).flatten(-2)[..., :length]


def vandermonde_log_backward(grad: Tensor, c: Tensor, x: Tensor, length: int) -> VandermondeGradients:
    """Of grad ``[C, H, length]``: ``dc = 2 conj(sum_l g_l e^{x l})``, ``dx = 2 conj(c sum_l l g_l e^{x l})``."""
    acc = accumulate_dtype(c)
    made = powers(as_complex(x, torch.float64), length).to(acc)
    zeroth, first = made.moments(grad.to(acc))
    weights = as_complex(c, torch.float64)
    return VandermondeGradients(like(2 * zeroth.conj(), c), like((2 * (weights * first).conj()).sum(0), x))
