"""Preference losses of sequences from their log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
        loss = (1 - given.beta * margin).clamp_min(0)
    elif given.kind == "orpo":
        loss = -means[chosen] - given.beta * logsigmoid(log_odds(x[chosen]) - log_odds(x[rejected]))
    else:
        u, eps = given.beta * margin - given.gamma, given.label_smoothing
        loss = -(1 - eps) * logsigmoid(u) - eps * logsigmoid(-u)
    return loss - given.nll_coef * means[chosen] if given.nll_coef else loss


def _unpaired(given: Preference, d: Tensor, labels: Tensor | None, kl: Tensor | None) -> Tensor:
    if given.kind == "ga":
        return d
    if given.kind == "npo":
        return -2 / given.beta * logsigmoid(-given.beta * d)
    assert labels is not None and kl is not None
    return labels.abs() * torch.sigmoid(-labels.sign() * (given.beta * d - kl))
