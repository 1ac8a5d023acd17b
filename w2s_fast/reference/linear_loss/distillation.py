"""Distillation row by row: D_t between teacher q and student p = softmax(z / tau), and cross-entropy with a label.

    fkl      sum q (log q - log p)                               rkl  sum p (log p - log q)
    jsd      beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    sce      -(1 - beta) sum q log p - beta sum p log q          ce_soft  -sum q log p
    product  -sum t log p, t held fixed, t proportional to p^beta q^power
    cosine   1 - z . y / (max(|z|, 1e-8) max(|y|, 1e-8)) of student's and teacher's logits z and y

These are definitions: they hold the whole [T, V] matrices that the linear kernels never form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .arguments import Distillation

KINDS = ("fkl", "rkl", "jsd", "sce", "ce_soft", "product", "cosine")
#: How a teacher is given, and by how many tensors: z; q; ids and log q; h and W; h, W and the bias.
FORMS = {"logits": 1, "probs": 1, "topk": 2, "linear": 2, "linear with bias": 3}
LOGITS, PROBS, TOPK, LINEAR, LINEAR_BIAS = range(5)
#: log q is at least this, so that a reverse divergence from a q of exact zeros is large but finite.
LOG_FLOOR = -1e4
#: Least probability mass of the classes outside a top-k teacher's list.
REMAINDER_FLOOR = 1e-12
#: A row of logits is at least this long in a cosine.
NORM_FLOOR = 1e-8


class Teacher(NamedTuple):
    """q and log q, ``[T, V]``, log q floored."""

    q: Tensor
    log_q: Tensor


def split(teachers: Sequence[Tensor], forms: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The flat list of tensors, a tuple a teacher."""
    counts, found, start = tuple(FORMS.values()), [], 0
    for form in forms:
        found.append(tuple(teachers[start : start + counts[form]]))
        start += counts[form]
    return found


def _logits(given: tuple[Tensor, ...], form: int, dtype: torch.dtype) -> Tensor:
    if form == LOGITS:
        return given[0].to(dtype)
    z = given[0].to(dtype) @ given[1].to(dtype).t()
    return z + given[2].to(dtype) if form == LINEAR_BIAS else z


def dense(ids: Tensor, log_q: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """q of a top-k teacher: exp(log_q) at its ids, the rest of the mass spread over the other classes."""
    a = log_q.to(dtype).exp()
    rest = vocab - ids.shape[1]
    r = (1 - a.sum(1, keepdim=True)).clamp_min(REMAINDER_FLOOR) / rest if rest else torch.zeros_like(a[:, :1])
    return r.expand(-1, vocab).scatter_add(1, ids.long(), a - r)


def teacher(
    teachers: Sequence[Tensor],
    forms: Sequence[int],
    weights: Sequence[float],
    tau: float,
    vocab: int,
    dtype: torch.dtype,
) -> Teacher:
    """q = sum_m weights_m q_m, the logarithm taken from logits where there are any (q may be too small for a float)."""
    logs = []
    for given, form in zip(split(teachers, forms), forms, strict=True):
        if form == PROBS:
            logs.append(given[0].to(dtype).log())
        elif form == TOPK:
            logs.append(dense(given[0], given[1], vocab, dtype).log())
        else:
            logs.append(torch.log_softmax(_logits(given, form, dtype) / tau, -1))
    if len(logs) == 1:
        log_q = logs[0]
    else:
        shares = torch.tensor(weights, dtype=dtype, device=logs[0].device).log()
        log_q = torch.logsumexp(torch.stack([log + share for log, share in zip(logs, shares, strict=True)]), 0)
    return Teacher(log_q.exp(), log_q.clamp_min(LOG_FLOOR))


def product_target(beta: float, power: float, log_p: Tensor, t: Teacher) -> Tensor:
    """p^beta q^power over its sum, 0 in rows where it is 0 for every class; a power of 0 leaves its factor out."""
    log_t = torch.zeros_like(log_p)
    if beta != 0:
        log_t = log_t + beta * log_p
    if power != 0:  # at the floor q is 0
        log_t = log_t + power * torch.where(t.log_q == LOG_FLOOR, -torch.inf, t.log_q)
    total = torch.logsumexp(log_t, 1, keepdim=True)
    return torch.where(total == -torch.inf, 0.0, torch.exp(log_t - total))


def entries(kind: int, beta: float, power: float, log_p: Tensor, t: Teacher) -> Tensor:
    """The terms ``[T, V]`` whose sum over the classes is D; those of probability 0 are 0. Differentiable in log_p."""
    p, name = log_p.exp(), KINDS[kind]
    under_p, under_q = torch.where(p > 0, log_p, 0.0), torch.where(t.q > 0, log_p, 0.0)
    if name == "product":
        target = product_target(beta, power, log_p.detach(), t)
        return -target * torch.where(target > 0, log_p, 0.0)
    if name == "fkl":
        return t.q * (t.log_q - under_q)
    if name == "rkl":
        return p * (under_p - t.log_q)
    if name == "ce_soft":
        return -t.q * under_q
    if name == "sce":
        return -(1 - beta) * t.q * under_q - beta * p * t.log_q
    r, s = log_ratios(beta, log_p, t)
    return beta * t.q * s + (1 - beta) * p * r


def log_ratios(beta: float, log_p: Tensor, t: Teacher) -> tuple[Tensor, Tensor]:
    """log p - log m and log q - log m of m = beta q + (1 - beta) p, 0 where p or q is.

    From the difference of the logarithms: equal models have exactly 0.
    """
    delta = t.log_q - log_p
    u = torch.exp(-delta.abs())
    over = torch.log(torch.where(delta > 0, beta + (1 - beta) * u, 1 - beta + beta * u))
    r = torch.where(log_p > -torch.inf, -over - delta.clamp_min(0), 0.0)
    return r, torch.where(t.q > 0, delta.clamp_max(0) - over, 0.0)


def cosine(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """D ``[T]`` of kind cosine and its gradient in z ``[T, V]``."""
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (z, y)]
    own, other = (norm.clamp_min(NORM_FLOOR) for norm in norms)
    similar = (z * y).sum(1, keepdim=True) / (own * other)
    grad = torch.where(norms[0] < NORM_FLOOR, 0.0, similar / own.square()) * z - y / (own * other)
    return 1 - similar.squeeze(1), grad


def divergence(kind: int, beta: float, power: float, log_p: Tensor, t: Teacher) -> tuple[Tensor, Tensor]:
    """D ``[T]`` and its gradient in z / tau ``[T, V]``; terms of probability 0 are 0."""
    p, name = log_p.exp(), KINDS[kind]
    if name == "product":
        target = product_target(beta, power, log_p, t)
        return -(target * torch.where(target > 0, log_p, 0.0)).sum(1), target.sum(1, keepdim=True) * p - target
    under_q = torch.where(t.q > 0, log_p, 0.0)
    under_p = torch.where(p > 0, log_p, 0.0)
    pulled = t.q.sum(1, keepdim=True) * p - t.q
    if name == "fkl":
        return (t.q * (t.log_q - under_q)).sum(1), pulled
    if name == "ce_soft":
        return -(t.q * under_q).sum(1), pulled
    if name == "sce":
        cross = p * t.log_q
        mean = cross.sum(1, keepdim=True)
        value = -(1 - beta) * (t.q * under_q).sum(1) - beta * mean.squeeze(1)
        return value, (1 - beta) * pulled - beta * (cross - p * mean)
    if name == "rkl":
        terms = p * (under_p - t.log_q)
        value = terms.sum(1)
        return value, terms - p * value.unsqueeze(1)
    r, s = log_ratios(beta, log_p, t)
    r = torch.where(p > 0, r, 0.0)
    mean = (p * r).sum(1)
    return beta * (t.q * s).sum(1) + (1 - beta) * mean, (1 - beta) * p * (r - mean.unsqueeze(1))


def statistics(log_p: Tensor, t: Teacher) -> Tensor:
    """``[3, T]``: entropy of the student, entropy of the teacher, whether the two have the same largest class."""
    p = log_p.exp()
    entropies = [-(x * torch.where(x > 0, log, 0.0)).sum(1) for x, log in ((p, log_p), (t.q, t.log_q))]
    return torch.stack([*entropies, (_argmax(log_p) == _argmax(t.q)).to(p.dtype)])


def _argmax(x: Tensor) -> Tensor:
    """The smallest index of the largest entry."""
    return (x == x.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


class Distilled(NamedTuple):
    """loss, a scalar, kd and ce ``[T]``, stats ``[3, T]`` and dlogits, the last two ``[0]`` unless needed."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    stats: Tensor
    dlogits: Tensor


def kd_loss(logits: Tensor, given: Distillation, need_gradient: bool, need_statistics: bool) -> Distilled:
    """loss = sum_t coef_kd_t D_t + coef_ce_t CE_t over the rows kept, with CE_t = -log softmax(z_t)[target_t].

    Returns loss, D ``[T]``, CE ``[T]`` (zeros without ``coef_ce``), `statistics` ``[3, T]`` and d loss / d logits
    (the last two ``[0]`` unless needed). Rows not kept are 0 everywhere, whatever they hold.
    """
    teachers, forms, shares, kind, tau, beta, power, target, keep, coef_kd, coef_ce = given
    dtype = accumulate_dtype(logits, *(t for t in teachers if t.is_floating_point()))
    rows, vocab = logits.shape
    kept = torch.ones(rows, dtype=torch.bool, device=logits.device) if keep is None else keep
    z = torch.where(kept.unsqueeze(1), logits.to(dtype), 0.0)
    t = teacher(teachers, forms, shares, tau, vocab, dtype)
    log_p = torch.log_softmax(z / tau, -1)
    if KINDS[kind] == "cosine":
        y = torch.where(kept.unsqueeze(1), _logits(tuple(teachers), forms[0], dtype), 0.0)
        kd, grad = cosine(z, y)
        grad = grad * tau  # in z / tau
    else:
        kd, grad = divergence(kind, beta, power, log_p, t)
    kd, c_kd = torch.where(kept, kd, 0.0), torch.where(kept, coef_kd.to(dtype), 0.0)
    grad = torch.where(kept.unsqueeze(1), grad * (c_kd / tau).unsqueeze(1), 0.0)
    loss, ce = (c_kd * kd).sum(), torch.zeros_like(kd)
    if coef_ce is not None and target is not None:
        log_one = log_p if tau == 1 else torch.log_softmax(z, -1)
        y = torch.where(kept, target, 0).unsqueeze(1)
        ce = torch.where(kept, -log_one.gather(1, y).squeeze(1), 0.0)
        c_ce = torch.where(kept, coef_ce.to(dtype), 0.0).unsqueeze(1)
        grad = (grad + c_ce * log_one.exp()).scatter_add(1, y, -c_ce)
        loss = loss + (c_ce.squeeze(1) * ce).sum()
    stats = torch.where(kept, statistics(log_p, t), 0.0) if need_statistics else kd.new_empty(0)
    return Distilled(loss, kd, ce, stats, grad.to(logits.dtype) if need_gradient else logits.new_empty(0))


class LinearDistilled(NamedTuple):
    """`Distilled` with the gradients of hidden, head and bias, ``[0]`` unless needed."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    stats: Tensor
    dhidden: Tensor
    dhead: Tensor
    dbias: Tensor


def linear_kd(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    given: Distillation,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
    need_statistics: bool,
) -> LinearDistilled:
    """`kd_loss` of logits z = W h + b; the gradients of hidden, head and bias (each ``[0]`` unless needed) replace
    that of the logits."""
    keep = given.keep
    dtype = accumulate_dtype(hidden, *(t for t in given.teachers if t.is_floating_point()))
    h, w = hidden.to(dtype), head.to(dtype)
    if keep is not None:
        h = torch.where(keep.unsqueeze(1), h, 0.0)
    z = h @ w.t() if bias is None else h @ w.t() + bias.to(dtype)
    need, offset = need_hidden or need_head or need_bias, hidden if bias is None else bias
    loss, kd, ce, stats, dz = kd_loss(z, given, need, need_statistics)
    return LinearDistilled(
        loss,
        kd,
        ce,
        stats,
        (dz @ w).to(hidden.dtype) if need_hidden else hidden.new_empty(0),
        (dz.t() @ h).to(head.dtype) if need_head else head.new_empty(0),
        dz.sum(0).to(offset.dtype) if need_bias else offset.new_empty(0),
    )
