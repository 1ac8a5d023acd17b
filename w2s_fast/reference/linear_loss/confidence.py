"""The loss of weak-to-strong generalization: cross-entropy with weak labels and the own hardened guess."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype

BALANCES = ("weak_prior", "median", "none")
WEAK_PRIOR, MEDIAN, NONE = range(3)
#: A mean probability is at least this (the smallest normal float32), so that a class that no row takes has no infinite
#: preference.
LEAST_MEAN = 2.0**-126


class Confidence(NamedTuple):
    """loss, a scalar, the threshold if one was made, and the gradient if it is needed."""

    loss: Tensor
    threshold_made: Tensor
    dlogits: Tensor


def w2s_confidence_loss(
    logits: Tensor,
    soft_labels: Tensor,
    product: bool,
    coef: float,
    alpha: float,
    beta: float,
    balance: int,
    threshold: Tensor | None,
    need_loss: bool,
    need_gradient: bool,
) -> Confidence:
    """loss = -(1 / B) sum t log p over classes of t != 0, p = softmax(logits), t held fixed.

    t = (1 - coef) w + coef guess, or with ``product`` p^beta w^alpha over its sum (0 in a row where all are 0). The
    guess is a class a row: with C = 2 class 0 where ``p_0 >= threshold`` (made: the quantile of p_0 at mean w_1, at
    1/2, or 1/2 itself); with C > 2 the first of the largest ``log p_c - threshold_c`` (made: log(mean p_c / mean w_c),
    or 0). ``[B]`` logits are those of class 1 beside a logit of 0, with w_1.

    Returns loss (0 unless needed), the threshold, [1] or [C] (``[0]`` if none was made) and d loss / d logits, in which
    p is multiplied by the sum of t, as soft labels sum to 1 only up to rounding (``[0]`` unless needed).
    """
    dtype = accumulate_dtype(logits)
    z, w = logits.to(dtype), soft_labels.to(dtype)
    if logits.ndim == 1:
        z, w = torch.stack((torch.zeros_like(z), z), 1), torch.stack((1 - w, w), 1)
    log_p = z.log_softmax(-1)
    made = z.new_empty(0)
    if product:
        # an exponent of 0 leaves a factor out, where 0 * log 0 would be NaN
        own = beta * log_p if beta else torch.zeros_like(log_p)
        joint = own + alpha * w.log() if alpha else own
        target = torch.where((joint == -torch.inf).all(1, keepdim=True), 0.0, joint.softmax(-1))
    elif coef == 0:
        target = w
    else:
        if threshold is None:
            threshold = made = choose(z.softmax(-1), w, balance)
        target = (1 - coef) * w + coef * harden(z, threshold)
    loss = z.new_zeros(())
    share = 1 / max(logits.shape[0], 1)
    if need_loss:
        loss = -torch.where(target == 0, 0.0, target * log_p).sum() * share
    if not need_gradient:
        return Confidence(loss, made, logits.new_empty(0))
    grad = (log_p.exp() * target.sum(1, keepdim=True) - target) * share
    return Confidence(loss, made, (grad[:, 1] if logits.ndim == 1 else grad).to(logits.dtype).contiguous())


def choose(p: Tensor, w: Tensor, balance: int) -> Tensor:
    """The threshold of a whole batch: ``[1]`` for two classes, ``[C]`` for more."""
    if p.shape[1] == 2:
        if balance == NONE or not p.shape[0]:
            return p.new_full((1,), 0.5)
        at = w[:, 1].mean() if balance == WEAK_PRIOR else p.new_full((), 0.5)
        # a mean off [0, 1] by rounding is taken as its end
        return torch.quantile(p[:, 0], at.clamp(0, 1)).reshape(1)
    if balance == NONE or not p.shape[0]:
        return p.new_zeros(p.shape[1])
    return (p.mean(0).clamp_min(LEAST_MEAN) / w.mean(0)).log()


def harden(z: Tensor, threshold: Tensor) -> Tensor:
    """One-hot guesses ``[B, C]``."""
    if z.shape[1] == 2:
        first = z.softmax(-1)[:, 0] >= threshold
        return torch.stack((first, ~first), 1).to(z.dtype)
    if not z.shape[0]:
        return torch.zeros_like(z)
    score = z - z.amax(1, keepdim=True) - threshold
    best = (score == score.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
    return torch.nn.functional.one_hot(best, z.shape[1]).to(z.dtype)
