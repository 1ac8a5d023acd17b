"""Preference losses of sequences from their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .ce import linear_loss_backward
from .fusion import linear_fusion_logprobs

PAIRED = ("dpo", "spin", "cdpo", "hinge", "ipo", "simpo", "orpo")
UNPAIRED = ("npo", "ga", "kto")
#: kinds that compare with a reference model
REFERENCED = ("dpo", "spin", "cdpo", "hinge", "ipo", "npo", "kto")
#: kinds that take length-averaged log-probabilities unless told otherwise
AVERAGED = ("ipo", "simpo", "orpo")
#: ORPO's log-odds have a pole at probability 1
HIGHEST = -1e-6


class Preference(NamedTuple):
    """Numbers of a preference loss; mean says that log-probabilities are averaged over a sequence's tokens."""

    kind: str
    beta: float
    gamma: float
    label_smoothing: float
    nll_coef: float
    mean: bool


def log_odds(m: Tensor) -> Tensor:
    """log(e^m / (1 - e^m)) for m <= -1e-6."""
    m = m.clamp_max(HIGHEST)
    return m - torch.log(-torch.expm1(m))


def preference_losses(
    given: Preference,
    sums: Tensor,
    counts: Tensor,
    ref: Tensor | None,
    pairs: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
) -> Tensor:
    """Loss of every pair ``[P]``, or of every sequence ``[S]`` for the kinds without pairs.

    With x the summed (or averaged) log-probability of a sequence, ref that of the reference, a and b the differences
    x - ref of the chosen and the rejected sequence, and u = beta (a - b):

    dpo, spin: -log sigma(u). cdpo: -(1 - eps) log sigma(u) - eps log sigma(-u). hinge: max(0, 1 - u).
    ipo: (a - b - 1 / (2 beta))^2. simpo: -log sigma(beta (x_w - x_l) - gamma).
    orpo: -mean_w - beta log sigma(odds_w - odds_l), odds the log-odds of x.
    npo: -(2 / beta) log sigma(-beta (x - ref)). ga: x.
    kto: |label| (1 - sigma(sign(label) (beta (x - ref) - kl))).

    Args:
        sums, counts: ``[S]`` summed log-probabilities and numbers of tokens.
        ref: ``[S]`` or None (0).
        pairs: ``[P, 2]`` (chosen, rejected) sequences.
        labels: ``[S]``; the sign is KTO's label, the size its weight.
        kl: a number, KTO's baseline.
    """
    means = sums / counts.clamp_min(1)
    x = means if given.mean else sums
    d = x if ref is None else x - ref
    if pairs is None:
        return _unpaired(given, d, labels, kl)
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    margin = d[chosen] - d[rejected]
    if given.kind == "ipo":
        loss = (margin - 1 / (2 * given.beta)).square()
    elif given.kind == "hinge":
        loss = (1 - given.beta * margin).relu()
    elif given.kind == "orpo":
        loss = -means[chosen] - given.beta * logsigmoid(log_odds(x[chosen]) - log_odds(x[rejected]))
    else:
        u, eps = given.beta * margin - given.gamma, given.label_smoothing
        loss = -(1 - eps) * logsigmoid(u)
        if eps:  # u may be infinite
            loss = loss - eps * logsigmoid(-u)
    return loss - given.nll_coef * means[chosen] if given.nll_coef else loss


def _unpaired(given: Preference, d: Tensor, labels: Tensor | None, kl: Tensor | None) -> Tensor:
    if given.kind == "ga":
        return d
    if given.kind == "npo":
        return -2 / given.beta * logsigmoid(-given.beta * d)
    assert labels is not None and kl is not None
    return labels.abs() * torch.sigmoid(-labels.sign() * (given.beta * d - kl))


def preference_slopes(
    given: Preference,
    sums: Tensor,
    counts: Tensor,
    ref: Tensor | None,
    pairs: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
) -> Tensor:
    """Derivative of the sum of `preference_losses` in ``sums``, ``[S]``."""
    size = counts.clamp_min(1)
    means = sums / size
    x = means if given.mean else sums
    d = x if ref is None else x - ref
    if pairs is None:
        slope = _unpaired_slope(given, d, labels, kl)
        return slope / size if given.mean else slope
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    margin = d[chosen] - d[rejected]
    own = other = torch.ones_like(margin)
    nll = given.nll_coef
    if given.kind == "ipo":
        g = 2 * (margin - 1 / (2 * given.beta))
    elif given.kind == "hinge":
        g = -given.beta * (given.beta * margin < 1).to(x.dtype)
    elif given.kind == "orpo":
        g = -given.beta * torch.sigmoid(log_odds(x[rejected]) - log_odds(x[chosen]))
        slopes = torch.where(x > HIGHEST, 0.0, -1 / torch.expm1(x.clamp_max(HIGHEST)))
        own, other, nll = slopes[chosen], slopes[rejected], nll + 1
    else:
        u, eps = given.beta * margin - given.gamma, given.label_smoothing
        g = -given.beta * ((1 - eps) * torch.sigmoid(-u) - eps * torch.sigmoid(u))
    slope = torch.zeros_like(x).index_add(0, chosen, g * own).index_add(0, rejected, -g * other)
    slope = slope / size if given.mean else slope
    return slope.index_add(0, chosen, -nll / size[chosen])


def _unpaired_slope(given: Preference, d: Tensor, labels: Tensor | None, kl: Tensor | None) -> Tensor:
    if given.kind == "ga":
        return torch.ones_like(d)
    if given.kind == "npo":
        return 2 * torch.sigmoid(given.beta * d)
    assert labels is not None and kl is not None
    p = torch.sigmoid(-labels.sign() * (given.beta * d - kl))
    return -labels * given.beta * p * (1 - p)


def linear_preference(
    hiddens: Sequence[Tensor],
    heads: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    temperature: float,
    softcap: float,
    vocab_size: int,
    target: Tensor,
    ignore_index: int,
    token_weights: Tensor | None,
    segments: Tensor,
    counts: Tensor,
    ref: Tensor | None,
    pairs: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
    kind: str,
    settings: Sequence[float],
    mean: bool,
    scale: float,
    need_hiddens: int,
    need_heads: int,
    need_biases: int,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """scale times the sum of `preference_losses`, the sums ``[S]`` of token_weights_t logp_t over the sequences
    ``segments``, and the gradients of the loss as in `linear_loss_backward`. settings: beta, gamma, label_smoothing,
    nll_coef."""
    model = (hiddens, heads, biases, weights, weight_values, temperature, softcap, vocab_size)
    beta, gamma, label_smoothing, nll_coef = settings
    given = Preference(kind, beta, gamma, label_smoothing, nll_coef, mean)
    logp, lse, _, _ = linear_fusion_logprobs(*model, target, ignore_index, False, False)
    keep = target != ignore_index
    own = keep.to(logp.dtype) if token_weights is None else torch.where(keep, token_weights.to(logp.dtype), 0.0)
    tokens = torch.where(own == 0, 0.0, own * logp)
    sums = tokens.new_zeros(counts.shape[0]).index_add(0, segments, tokens)
    counts = counts.to(sums.dtype)
    others = (None if ref is None else ref.to(sums.dtype), pairs, labels, kl)
    slopes = preference_slopes(given, sums, counts, *others)
    coef = scale * slopes[segments] * own
    grads = linear_loss_backward(
        *model, lse, target.unsqueeze(1), coef.unsqueeze(1), -coef, None, None, None, None, need_hiddens, need_heads,
        need_biases, need_weights,
    )  # fmt: skip
    return scale * preference_losses(given, sums, counts, *others).sum(), sums, *grads
