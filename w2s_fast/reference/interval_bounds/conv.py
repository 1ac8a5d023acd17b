"""interval_conv2d in plain PyTorch: a box through a convolution and ReLU, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from .arguments import Box, Convolution, LayerGradients
from .boxes import center_radius, outward, sound_bounds, sound_operand, spread_limit, unit, without_tf32


def interval_conv2d(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    bounds_in: bool,
    bounds_out: bool,
    relu: bool,
    compute: str,
    sound: bool,
    spread: float,
) -> Box:
    """Centre ``conv(m, W) + b`` and radius ``conv(r, |W|)``; as lower and upper if ``bounds_out``, both through ReLU if
    ``relu``. ``sound`` computes in float64, covers its rounding error and ``spread (|W| |x| + |bias|)`` too and rounds
    outward.
    """
    options = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    if sound:
        terms = weight[0].numel() + 6 if len(weight) else 6
        m, r, gamma = sound_operand(a, b, bounds_in, terms, spread)
        w = weight.double()
        center = F.conv2d(m, w, None if bias is None else bias.double(), *options)
        radius = F.conv2d(r, w.abs(), None, *options)
        if bias is not None:
            radius = radius + bias.double().abs().reshape(-1, 1, 1) * spread
        limit = spread_limit(spread, a.dtype)
        x, y = sound_bounds(center, radius * (1 + 2 * gamma), 4 * unit(torch.float64), limit)
        x, y = (x.relu(), y.relu()) if relu else (x, y)
        return Box(outward(x, a.dtype, True), outward(y, a.dtype, False))
    m, r = center_radius(a, b) if bounds_in else (a, b)
    with without_tf32(a):
        m, r = F.conv2d(m, weight, bias, *options), F.conv2d(r, weight.abs(), None, *options)
    x, y = (m - r, m + r) if bounds_out else (m, r)
    return Box(x.relu(), y.relu()) if relu else Box(x.contiguous(), y.contiguous())


def interval_conv2d_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    out_a: Tensor,
    out_b: Tensor,
    conv: Convolution,
    bounds_in: bool,
    bounds_out: bool,
    relu: bool,
    compute: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> LayerGradients:
    """Gradients of a, b, weight and bias; of shape [0] where not wanted. The formulas are those of
    `reference.interval_bounds.linear`, with convolutions for products.
    """
    if relu:
        grad_a, grad_b = torch.where(out_a > 0, grad_a, 0), torch.where(out_b > 0, grad_b, 0)
    gm, gr = (grad_a + grad_b, grad_b - grad_a) if bounds_out else (grad_a, grad_b)
    options = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    none = a.new_empty((0,))
    da = db = dw = dbias = none
    with without_tf32(a):
        if need_x:
            da = conv_grad.conv2d_input(a.shape, weight, gm, *options)
            db = conv_grad.conv2d_input(a.shape, weight.abs(), gr, *options)
            if bounds_in:
                da, db = (da - db) * 0.5, (da + db) * 0.5
        if need_weight:
            m, r = center_radius(a, b) if bounds_in else (a, b)
            dw = conv_grad.conv2d_weight(m, weight.shape, gm, *options)
            dw = dw + weight.sign() * conv_grad.conv2d_weight(r, weight.shape, gr, *options)
    if need_bias:
        dbias = gm.sum((0, 2, 3))
    return LayerGradients(da.contiguous(), db.contiguous(), dw.contiguous(), dbias)
