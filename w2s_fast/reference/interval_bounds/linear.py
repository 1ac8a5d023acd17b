"""interval_linear in plain PyTorch: a box through x -> W x + b and ReLU, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Box, LayerGradients
from .boxes import center_radius, outward, sound_bounds, sound_operand, spread_limit, unit, without_tf32


def interval_linear(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bounds_in: bool,
    bounds_out: bool,
    relu: bool,
    compute: str,
    sound: bool,
    spread: float,
) -> Box:
    """Centre ``m W^T + b`` and radius ``r |W|^T``; as lower and upper if ``bounds_out``, both through ReLU if ``relu``.

    ``sound`` computes in float64, covers its rounding error and ``spread (|W| |x| + |bias|)`` too and rounds outward.
    ``compute`` is a permission that plain PyTorch does not use.
    """
    if sound:
        return Box(*_sound(a, b, weight, bias, bounds_in, relu, spread))
    m, r = center_radius(a, b) if bounds_in else (a, b)
    with without_tf32(a):
        m, r = F.linear(m, weight, bias), F.linear(r, weight.abs())
    x, y = (m - r, m + r) if bounds_out else (m, r)
    return Box(x.relu(), y.relu()) if relu else Box(x, y)


def _sound(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, bounds_in: bool, relu: bool, spread: float
) -> tuple[Tensor, Tensor]:
    m, r, gamma = sound_operand(a, b, bounds_in, a.shape[1] + 6, spread)
    w = weight.double()
    center, radius = F.linear(m, w, None if bias is None else bias.double()), F.linear(r, w.abs())
    if bias is not None:
        radius = radius + bias.double().abs() * spread
    limit = spread_limit(spread, a.dtype)
    x, y = sound_bounds(center, radius * (1 + 2 * gamma), 4 * unit(torch.float64), limit)
    if relu:
        x, y = x.relu(), y.relu()
    return outward(x, a.dtype, True), outward(y, a.dtype, False)


def interval_linear_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    out_a: Tensor,
    out_b: Tensor,
    bounds_in: bool,
    bounds_out: bool,
    relu: bool,
    compute: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> LayerGradients:
    """Gradients of a, b, weight and bias; of shape [0] where not wanted.

    With G_m, G_r those of centre and radius before the activation: ``dm = G_m W``, ``dr = G_r |W|``,
    ``dW = G_m^T m + sign(W) o (G_r^T r)``, ``db = sum G_m``; sign(0) = 0, and ReLU has slope 0 at 0.
    """
    if relu:
        grad_a, grad_b = torch.where(out_a > 0, grad_a, 0), torch.where(out_b > 0, grad_b, 0)
    gm, gr = (grad_a + grad_b, grad_b - grad_a) if bounds_out else (grad_a, grad_b)
    none = a.new_empty((0,))
    da = db = dw = dbias = none
    with without_tf32(a):
        if need_x:
            da, db = gm @ weight, gr @ weight.abs()
            if bounds_in:
                da, db = (da - db) * 0.5, (da + db) * 0.5
        if need_weight:
            m, r = center_radius(a, b) if bounds_in else (a, b)
            dw = gm.t() @ m + weight.sign() * (gr.t() @ r)
    if need_bias:
        dbias = gm.sum(0)
    return LayerGradients(da, db, dw.contiguous(), dbias)
