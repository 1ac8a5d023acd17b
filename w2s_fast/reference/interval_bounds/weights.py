"""interval_linear_iw in plain PyTorch: a linear layer whose weight is an interval too."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Ends
from .boxes import outward, unit, without_tf32

MODES = ("nonneg", "general", "midrad")


class Products(NamedTuple):
    """Lower, middle and upper ``[B, N]``."""

    yl: Tensor
    ym: Tensor
    yu: Tensor


class EndsGradients(NamedTuple):
    """Each like its end."""

    dxl: Tensor
    dxm: Tensor
    dxu: Tensor
    dwl: Tensor
    dwm: Tensor
    dwu: Tensor


def interval_linear_iw(ends: Ends, mode: int, sound: bool) -> Products:
    """Lower, middle and upper products, without bias. Middle: ``x_m W_m^T``.

    nonneg (x_l >= 0): ``sum W_l (x_l where W_l >= 0, else x_u)`` and ``sum W_u (x_u where W_u >= 0, else x_l)``.
    general: sums of the smallest and of the largest of the four products of ends. midrad: with centres c and radii r,
    ``c_x c_W^T -+ (|c_x| r_W^T + r_x (|c_W| + r_W)^T)``. ``sound`` computes the ends in float64, covers its rounding
    errors too and rounds outward.
    """
    xl, xm, xu, wl, wm, wu = ends
    if sound:
        with without_tf32(xl):
            middle = F.linear(xm, wm)
        lower, upper = _sound(xl, xu, wl, wu, mode)
        return Products(lower, middle, upper)
    with without_tf32(xl):
        middle = F.linear(xm, wm)
        if mode == 0:
            lower = F.linear(xl, wl.clamp_min(0)) + F.linear(xu, wl.clamp_max(0))
            return Products(lower, middle, F.linear(xu, wu.clamp_min(0)) + F.linear(xl, wu.clamp_max(0)))
        if mode == 2:
            cx, rx, cw, rw = (xl + xu) * 0.5, (xu - xl) * 0.5, (wl + wu) * 0.5, (wu - wl) * 0.5
            center, radius = F.linear(cx, cw), F.linear(cx.abs(), rw) + F.linear(rx, cw.abs() + rw)
            return Products(center - radius, middle, center + radius)
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for low, high in zip(xl, xu, strict=True):
        products = torch.stack((wl * low, wl * high, wu * low, wu * high))
        rows[0].append(products.amin(0).sum(1))
        rows[1].append(products.amax(0).sum(1))
    lower, upper = (torch.stack(found) if found else middle.new_empty(middle.shape) for found in rows)
    return Products(lower, middle, upper)


def _sound(xl: Tensor, xu: Tensor, wl: Tensor, wu: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Lower and upper; csrc/cpu/interval_bounds/linear.h says why ends moved like this are enough."""
    eta = (4 if mode == 2 else 1) * (xl.shape[1] + 8) * unit(torch.float64) * 1.01 + 16 * unit(torch.float64)
    x = _spread(xl.double(), xu.double(), eta, mode == 2)
    w = _spread(wl.double(), wu.double(), eta, True) if mode == 2 else _spread(wl.double(), wu.double(), 0.0, False)
    lower, _, upper = interval_linear_iw(Ends(x[0], x[0], x[1], w[0], w[0], w[1]), mode, False)
    known = lower.abs() + upper.abs() < torch.inf
    slack = 4 * unit(torch.float64)
    lower = torch.where(known, lower - (lower.abs() * slack + 1e-300), -torch.inf)
    upper = torch.where(known, upper + (upper.abs() * slack + 1e-300), torch.inf)
    return outward(lower, xl.dtype, True), outward(upper, xl.dtype, False)


def _spread(low: Tensor, high: Tensor, eta: float, common: bool) -> tuple[Tensor, Tensor]:
    """Ends moved apart by eta of their size (``common``: of the larger); NaN where not finite, an exact 0 stays one."""
    known = low.abs() + high.abs() < torch.inf
    sizes = (low.abs(), high.abs())
    if common:
        sizes = (torch.maximum(*sizes),) * 2
    least = torch.finfo(torch.float64).tiny if eta else 0.0
    steps = [torch.where(size > 0, size * eta + least, 0.0) for size in sizes]
    return torch.where(known, low - steps[0], torch.nan), torch.where(known, high + steps[1], torch.nan)


def _extreme(xl: Tensor, xu: Tensor, wl: Tensor, wu: Tensor, smallest: bool) -> tuple[Tensor, Tensor]:
    """Whether the extreme product takes x_u, and whether it takes W_u; the first of equal ones counts."""
    products = torch.stack((wl * xl, wl * xu, wu * xl, wu * xu))
    which = products.argmin(0) if smallest else products.argmax(0)
    return which % 2 == 1, which >= 2


def interval_linear_iw_backward(
    gl: Tensor, gm: Tensor, gu: Tensor, ends: Ends, mode: int
) -> EndsGradients:
    """Gradients of x_l, x_m, x_u, W_l, W_m, W_u."""
    xl, xm, xu, wl, wm, wu = ends
    with without_tf32(xl):
        dxm, dwm = gm @ wm, gm.t() @ xm
        if mode == 0:
            lp, ln, up, un = wl.clamp_min(0), wl.clamp_max(0), wu.clamp_min(0), wu.clamp_max(0)
            dxl, dxu = gl @ lp + gu @ un, gl @ ln + gu @ up
            dwl = torch.where(wl >= 0, gl.t() @ xl, gl.t() @ xu)
            return EndsGradients(dxl, dxm, dxu, dwl, dwm, torch.where(wu >= 0, gu.t() @ xu, gu.t() @ xl))
        if mode == 2:
            cx, rx, cw, rw = (xl + xu) * 0.5, (xu - xl) * 0.5, (wl + wu) * 0.5, (wu - wl) * 0.5
            gc, gr = gl + gu, gu - gl
            dcx, drx = gc @ cw + cx.sign() * (gr @ rw), gr @ (cw.abs() + rw)
            dcw = gc.t() @ cx + cw.sign() * (gr.t() @ rx)
            drw = gr.t() @ (cx.abs() + rx)
            halves = (dcx - drx) / 2, dxm, (dcx + drx) / 2, (dcw - drw) / 2, dwm, (dcw + drw) / 2
            return EndsGradients(*halves)
    dxl, dxu, dwl, dwu = (torch.zeros_like(t) for t in (xl, xu, wl, wu))
    for i in range(len(xl)):
        for g, smallest in ((gl, True), (gu, False)):
            x_up, w_up = _extreme(xl[i], xu[i], wl, wu, smallest)
            part = g[i][:, None]
            to_x, to_w = part * torch.where(w_up, wu, wl), part * torch.where(x_up, xu[i], xl[i])
            dxl[i] += torch.where(x_up, 0, to_x).sum(0)
            dxu[i] += torch.where(x_up, to_x, 0).sum(0)
            dwl += torch.where(w_up, 0, to_w)
            dwu += torch.where(w_up, to_w, 0)
    return EndsGradients(dxl, dxm, dxu, dwl, dwm, dwu)
