"""One position of a diagonal state space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """y ``[B, H]`` in the dtype of u; the state after it ``[B, H, M, 2]`` in float32 (float64)."""

    y: Tensor
    after: Tensor


def s4d_step(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> Step:
    """``x' = a x + b u``, ``y = 2 Re sum_n c_n x'_n + d u`` of u ``[B, H]`` and x, the state ``[B, H, M, 2]``.

    a, b, c complex ``[H, M, 2]``, d ``[H]``. Arithmetic in float32, float64 if u or the state is.
    """
    acc = torch.float64 if torch.float64 in (u.dtype, state.dtype) else torch.float32
    # in real numbers: complex sums and products of torch make NaN of an infinity
    (ar, ai), (br, bi), (cr, ci), (xr, xi) = (t.to(acc).unbind(-1) for t in (a, b, c, state))
    wide = u.to(acc)[..., None]
    re, im = ar * xr - ai * xi + br * wide, ar * xi + ai * xr + bi * wide
    y = 2 * (cr * re - ci * im).sum(-1) + d.to(acc) * wide[..., 0]
    return Step(y.to(u.dtype), torch.stack((re, im), -1))
