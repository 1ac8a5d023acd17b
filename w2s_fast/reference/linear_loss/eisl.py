"""Edit-invariant sequence loss (EISL): n-grams of the target matched softly at every output position.

    cost_ij = max(log softmax(W h_i + b)[y_j], floor)                        [T, T']
    S_ij = (1 / n) sum_{k < n} cost_{i+k, j+k}                               [T - n + 1, T' - n + 1]
    g_ij = softmax over i of (S_ij + noise_ij) / tau
    L_n = -mean over j of sum_i g_ij S_ij,   or, for logsumexp,   -mean over j of log sum_i exp(n S_ij)

These are definitions: they hold the whole [B, T, V] tensor that the kernels never form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


def windows(keep: Tensor | None, n: int, batch: int, length: int, like: Tensor) -> Tensor:
    """``[B, length - n + 1]``: whether all n positions from each are kept."""
    if keep is None:
        return torch.ones(batch, length - n + 1, dtype=torch.bool, device=like.device)
    count = length - n + 1
    return torch.stack([keep[:, k : k + count] for k in range(n)]).all(0)


def ngram(
    cost: Tensor, n: int, tau: float, logsumexp: bool, noise: Tensor | None, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """L_n, the mean over sentences, and its gradient in cost ``[B, T, T']``; rows and columns say which n-grams count.

    A sentence without a row or without a column that counts costs nothing.
    """
    batch, t, u = cost.shape
    height, width = t - n + 1, u - n + 1
    s = torch.stack([cost[:, k : k + height, k : k + width] for k in range(n)]).sum(0) / n
    columns = columns & rows.any(1, keepdim=True)
    share = columns.to(cost.dtype) / (columns.sum(1, keepdim=True).clamp_min(1) * max(batch, 1))  # of column j
    x = n * s if logsumexp else s / tau if noise is None else (s + noise.to(s.dtype)) / tau
    x = torch.where(rows.unsqueeze(2), x, -torch.inf)
    x = torch.where(rows.any(1)[:, None, None], x, 0.0)
    g = torch.softmax(x, 1)
    if logsumexp:
        value = torch.logsumexp(x, 1)
        ds = n * g
    else:
        value = (g * s).sum(1)
        ds = g * (1 + (s - value.unsqueeze(1)) / tau)
    ds = -share.unsqueeze(1) * ds
    dcost = torch.zeros_like(cost)
    for k in range(n):
        dcost[:, k : k + height, k : k + width] += ds / n
    return -(share * value).sum(), dcost


class Eisl(NamedTuple):
    """loss, a scalar, parts ``[n-grams + 1]``, and the gradients, ``[0]`` unless needed."""

    loss: Tensor
    parts: Tensor
    dhidden: Tensor
    dhead: Tensor
    dbias: Tensor


def linear_eisl(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ngrams: Sequence[int],
    weights: Sequence[float],
    tau: float,
    logsumexp: bool,
    floor: float,
    noise: Sequence[Tensor],
    src_keep: Tensor | None,
    tgt_keep: Tensor | None,
    ngram_coef: float,
    ce_coef: float,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
) -> Eisl:
    """loss = ngram_coef sum_n weights_n L_n + ce_coef CE, CE the mean of -log softmax(z_i)[y_i] over positions kept in
    both source and target.

    hidden ``[B, T, D]``, target ``[B, T']``; noise empty or one ``[B, T - n + 1, T' - n + 1]`` an n. Returns loss,
    parts ``[len(ngrams) + 1]`` (every L_n, then CE, 0 where ``ce_coef`` is) and the gradients of hidden, head and bias,
    each ``[0]`` unless needed.
    """
    dtype = accumulate_dtype(hidden)
    (batch, t, _), u = hidden.shape, target.shape[1]
    h, w = hidden.to(dtype), head.to(dtype)
    if src_keep is not None:
        h = torch.where(src_keep.unsqueeze(2), h, 0.0)
    z = h @ w.t() if bias is None else h @ w.t() + bias.to(dtype)
    y = target if tgt_keep is None else torch.where(tgt_keep, target, 0)
    log_p = torch.log_softmax(z, -1)
    raw = log_p.gather(2, y.unsqueeze(1).expand(batch, t, u))
    cost = raw.clamp_min(floor)
    parts, dcost = [], torch.zeros_like(cost)
    for i, (n, weight) in enumerate(zip(ngrams, weights, strict=True)):
        value, grad = ngram(
            cost, n, tau, logsumexp, noise[i] if noise else None,
            windows(src_keep, n, batch, t, z), windows(tgt_keep, n, batch, u, z),
        )
        parts.append(value)
        dcost += ngram_coef * weight * grad
    a = torch.where(raw > floor, dcost, 0.0)
    loss, ce = torch.zeros_like(z[:0].sum()), torch.zeros_like(z[:0].sum())
    for weight, value in zip(weights, parts, strict=True):
        loss = loss + ngram_coef * weight * value
    if ce_coef:
        both = windows(src_keep, 1, batch, t, z) & windows(tgt_keep, 1, batch, u, z)
        share = both.to(dtype) / both.sum().clamp_min(1)
        ce = -(share * raw.diagonal(dim1=1, dim2=2)).sum()
        a = a - torch.diag_embed(ce_coef * share)
        loss = loss + ce_coef * ce
    offset = hidden if bias is None else bias
    dz = (-a.sum(2, keepdim=True) * log_p.exp()).scatter_add(2, y.unsqueeze(1).expand(batch, t, u), a)
    return Eisl(
        loss,
        torch.stack([*parts, ce]),
        (dz @ w).to(hidden.dtype) if need_hidden else hidden.new_empty(0),
        (dz.flatten(0, 1).t() @ h.flatten(0, 1)).to(head.dtype) if need_head else head.new_empty(0),
        dz.sum((0, 1)).to(offset.dtype) if need_bias else offset.new_empty(0),
    )
