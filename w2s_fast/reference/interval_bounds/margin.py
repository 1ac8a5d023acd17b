"""Worst-case margins of a last layer over a box, in plain PyTorch, a class at a time: [B, C, d] is never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import accumulate_dtype
from .arguments import LayerGradients
from .boxes import center_radius, outward, sound_operand, unit


def margin_logits(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, bounds: bool, sound: bool, spread: float
) -> Tensor:
    """``z_ik = max over the box of f_k - f_y = D m_i + |D| r_i + b_k - b_y`` with ``D = W_k - W_y``; 0 at k = y.

    ``sound`` computes in float64, covers its rounding error and ``spread (|W| |x| + |bias|)`` of both logits too, and
    rounds up.
    """
    kind = accumulate_dtype(a)
    wide = torch.float64 if sound else kind
    gamma, w = 0.0, weight.to(wide)
    if sound:
        m, r, gamma = sound_operand(a, b, bounds, a.shape[1] + 8)
    else:
        m, r = center_radius(a.to(wide), b.to(wide)) if bounds else (a.to(wide), b.to(wide))
    shift = torch.zeros_like(w[:, 0]) if bias is None else bias.to(wide)
    own, columns = w[y], []
    lost = None
    if sound and spread > 0:  # a fourth of the largest number: partial sums may overflow
        size = F.linear(m.abs() + r, w.abs(), None if bias is None else bias.to(wide).abs())
        size = torch.where(size < torch.finfo(kind).max / 4, size, torch.inf)
        lost = size * (spread * (1 + 2 * gamma + 8 * unit(wide))) + torch.finfo(kind).tiny
    for k in range(w.shape[0]):
        d = w[k] - own
        center, radius, step = (d * m).sum(1), (d.abs() * r).sum(1) * (1 + 2 * gamma), shift[k] - shift[y]
        z = center + radius + step
        if sound:
            size = center.abs() + radius + step.abs()
            if lost is not None:
                both = lost[:, k] + lost.gather(1, y[:, None])[:, 0]
                z, size = z + both, size + both
            z = torch.where(size < torch.inf, z + 16 * unit(wide) * size + 1e-300, torch.inf)
        columns.append(torch.where(y == k, 0.0, z))
    z = torch.stack(columns, 1)
    return outward(z, kind, False) if sound else z


def margin_logits_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    y: Tensor,
    bounds: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> LayerGradients:
    """Gradients of a, b, weight and bias; of shape [0] where not wanted.

    ``dm = sum_k g_k D_k``, ``dr = sum_k g_k |D_k|``, ``dW_k += g_k (m + sign(D_k) r)`` and the same from ``dW_y``.
    """
    kind = accumulate_dtype(a)
    g = grad.to(kind) * (torch.arange(weight.shape[0], device=y.device) != y[:, None])
    m, r = center_radius(a.to(kind), b.to(kind)) if bounds else (a.to(kind), b.to(kind))
    w, dm, dr = weight.to(kind), torch.zeros_like(m), torch.zeros_like(r)
    own, dw, taken = w[y], torch.zeros_like(w), torch.zeros_like(m)
    for k in range(w.shape[0]):
        d, part = w[k] - own, g[:, k : k + 1]
        dm, dr = dm + part * d, dr + part * d.abs()
        if need_weight:
            moved = part * (m + d.sign() * r)
            dw[k] = moved.sum(0)
            taken = taken + moved
    none = a.new_empty((0,))
    da = db = dweight = dbias = none
    if need_x:
        da, db = ((dm - dr) * 0.5, (dm + dr) * 0.5) if bounds else (dm, dr)
        da, db = da.to(a.dtype), db.to(a.dtype)
    if need_weight:
        dweight = (dw - torch.zeros_like(dw).index_add(0, y, taken)).to(weight.dtype)
    if need_bias:
        dbias = (g.sum(0) - g.new_zeros(w.shape[0]).index_add(0, y, g.sum(1))).to(weight.dtype)
    return LayerGradients(da, db, dweight, dbias)


class Margins(NamedTuple):
    """loss and worst ``[B]``, z ``[B, C]``."""

    loss: Tensor
    worst: Tensor
    z: Tensor


def margin_cross_entropy(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, bounds: bool, sound: bool, spread: float
) -> Margins:
    """``(loss, worst, z)``: ``loss_i = log sum_k exp z_ik``, the cross-entropy; ``worst_i = max_(k != y) z_ik``."""
    z = margin_logits(a, b, weight, bias, y, bounds, sound, spread)
    other = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf) if len(y) else z
    worst = other.amax(1)
    return Margins(torch.where(worst == torch.inf, torch.inf, torch.logsumexp(z, 1)), worst, z)
