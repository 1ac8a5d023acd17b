"""Gradients of the logit fusion ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..numerics import accumulate_dtype
from .arguments import DECOUPLED, Fusion
from .dynamic_weights import log_probabilities, tilted, tilts
from .fuse import fused, heat, shifts


class FuseGradients(NamedTuple):
    """dz ``[B, V]``, dweights ``[B, K]`` and dtemperature ``[B]``."""

    dz: Tensor
    dweights: Tensor
    dtemperature: Tensor


def fuse_backward(
    given: Fusion,
    grad: Tensor | None,
    lse: Tensor,
    row_a: Tensor | None,
    row_b: Tensor | None,
    index: Tensor | None,
    index_coef: Tensor | None,
    subtract_row_sum: bool,
    need_params: bool,
) -> FuseGradients:
    """dz = g / temperature ``[B, V]`` in the dtype of base, dweights ``[B, K]`` and dtemperature ``[B]``, where

        g_v = grad_v + P_v (row_a + row_b z_v - [subtract_row_sum] sum_u grad_u) + sum_j index_coef_j [v = index_j],

    P_v = exp(z_v - lse), and g_v = 0 where z_v = -inf. dweights_k = sum_v dz_v d_k,v and dtemperature =
    -sum_v g_v z_v / temperature, over the columns with z_v > -inf; both ``[0]`` unless ``need_params``.
    """
    z = fused(given)
    masked = z == -math.inf
    level = torch.where(masked, 0.0, z)
    g = torch.zeros_like(z) if grad is None else grad.to(z.dtype)
    coefficient = torch.zeros_like(z[:, :1])
    if row_a is not None:
        coefficient = coefficient + row_a.to(z.dtype).unsqueeze(1)
    if row_b is not None:
        coefficient = coefficient + row_b.to(z.dtype).unsqueeze(1) * level
    if subtract_row_sum:
        coefficient = coefficient - g.sum(-1, keepdim=True)
    if row_a is not None or row_b is not None or subtract_row_sum:
        g = g + (z - lse.to(z.dtype).unsqueeze(1)).exp() * coefficient
    if index is not None:
        assert index_coef is not None
        for j in range(index.shape[1]):  # one at a time: an index may occur twice, and the order of sums is then fixed
            g = g.scatter_add(1, index[:, j : j + 1], index_coef[:, j : j + 1].to(z.dtype))
    g = torch.where(masked, 0.0, g)
    dz = g / heat(given, z)
    if not need_params:
        return FuseGradients(dz.to(given.base.dtype), z.new_empty(0), z.new_empty(0))
    shift = shifts(given.experts, given.anti, given.vocab_size, z.dtype)
    columns = [torch.where(masked, 0.0, dz * d).sum(-1) for d in shift]
    dweights = torch.stack(columns, 1) if columns else z.new_zeros(z.shape[0], 0)
    return FuseGradients(dz.to(given.base.dtype), dweights, -(dz * level).sum(-1))


class SolveGradients(NamedTuple):
    """Each like its argument; dtarget ``[B, K]``."""

    dbase: Tensor
    dexperts: list[Tensor]
    danti: list[Tensor]
    dtarget: Tensor


def dynamic_fusion_weights_backward(
    grad_alpha: Tensor,
    alpha: Tensor,
    saturated: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    multi: int,
    direction_kind: int,
    direction: Tensor | None,
    average: bool,
    has_target: bool,
    vocab_size: int,
) -> SolveGradients:
    """Gradient of the exact weights by the implicit function theorem on F(t) = T.

    With P = P_t, x the shift along the ray, m = E_P x, and den = F'(t) = t Var_P x:

        dt/dbase = -(t P (x - m) - P + p) / den        dt/dx = -t^2 P (x - m) / den        dt/dT = 1 / den
        dT_k/dexperts_k = Q_k (d_k - E_{Q_k} d_k)      dT_k/danti_k = Q_0 - Q_k

    Ray: alpha = t u, t = max_k alpha_k, u constant, x = sum_k u_k d_k, T = mean_k T_k. Decoupled: one such problem an
    expert. With ``has_target`` the T terms are dtarget ``[B, K]`` (zeros otherwise). Zero where saturated or alpha is
    0; each gradient in its input's dtype and full width, zero past ``vocab_size``.
    """
    logp, shift, _ = tilts(base, experts, anti, vocab_size)
    count = len(shift)
    step = alpha.double() * (count if average and multi == DECOUPLED else 1)
    upstream = grad_alpha.double() / (count if average and multi == DECOUPLED else 1)
    d_base = torch.zeros_like(logp)
    d_shift = [torch.zeros_like(logp) for _ in shift]
    d_target = torch.zeros_like(step)
    if multi == DECOUPLED:
        unit = torch.ones_like(step[:, 0])
        problems = [(step[:, k], upstream[:, k], saturated[:, k], {k: unit}) for k in range(count)]
    else:
        t = step.amax(1)
        u = torch.where(t.unsqueeze(1) == 0, 0.0, step / t.unsqueeze(1))
        problems = [(t, (upstream * u).sum(1), saturated.any(1), {k: u[:, k] for k in range(count)})]
    for t, g, stuck, parts in problems:
        x = torch.stack([u_k.unsqueeze(1) * shift[k] for k, u_k in parts.items()]).sum(0)
        p, _, mean, variance = tilted(logp, x, t)
        scale = torch.where(stuck | (t == 0), 0.0, g / (t * variance)).unsqueeze(1)
        lean = t.unsqueeze(1) * p * (x - mean.unsqueeze(1))
        d_base -= _scaled(scale, lean - p + logp.exp())
        for k, u_k in parts.items():
            d_shift[k] -= _scaled(scale, t.unsqueeze(1) * u_k.unsqueeze(1) * lean)
            d_target[:, k] += scale[:, 0] / len(parts)
    # a shift that is infinite does not move
    moving = [torch.isfinite(d) for d in shifts(experts, anti, vocab_size, torch.float64)]
    d_experts = [torch.where(mask, d, 0.0) for mask, d in zip(moving, d_shift, strict=True)]
    d_anti = [-d for d in d_experts]
    if not has_target:
        for k, (to_expert, to_anti) in enumerate(_target_gradients(experts, anti, vocab_size)):
            d_experts[k] = d_experts[k] + _scaled(d_target[:, k : k + 1], to_expert)
            d_anti[k] = d_anti[k] + _scaled(d_target[:, k : k + 1], to_anti)
        d_target = torch.zeros_like(d_target)
    if len(anti) == 1:
        d_anti = [torch.stack(d_anti).sum(0)]
    return SolveGradients(
        _as(d_base, base),
        [_as(d, like) for d, like in zip(d_experts, experts, strict=True)],
        [_as(d, like) for d, like in zip(d_anti, anti, strict=True)],
        d_target.to(accumulate_dtype(base, *experts, *anti)),
    )


def _target_gradients(
    experts: Sequence[Tensor], anti: Sequence[Tensor], vocab_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of T_k = KL(Q_k || Q_0) with respect to experts_k and its anti, ``[B, V]`` each."""
    found = []
    for k, expert in enumerate(experts):
        logq, log0 = (log_probabilities(t, vocab_size) for t in (expert, anti[k if len(anti) > 1 else 0]))
        q = logq.exp()
        d = torch.where(q == 0, 0.0, logq - log0)
        found.append((q * (d - (q * d).sum(-1, keepdim=True)), log0.exp() - q))
    return found


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    """``scale [B, 1] x``, exactly zero where the scale is, whatever x."""
    return torch.where(scale == 0, 0.0, scale * x)


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` in the dtype and width of ``like``."""
    return pad(gradient, (0, like.shape[1] - gradient.shape[1])).to(like.dtype).contiguous()
