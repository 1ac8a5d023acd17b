"""One step of Adam in a subspace of a matrix's gradient (GaLore), and of what lies outside it (Fira)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype

#: What `Rule.outside` says of the gradient outside the subspace: left out, one factor a row or column, one factor.
OUTSIDE = ("none", "column", "matrix")
TINY = 1e-8


class Rule(NamedTuple):
    """A step's numbers: ``rate`` is the learning rate with all corrections, ``keep`` what decay leaves of p.

    right: P is on the right of G; outside: a place in `OUTSIDE`; limit: of the growth of |S|, 0 for none.
    """

    beta1: float
    beta2: float
    eps: float
    rate: float
    keep: float
    scale: float
    limit: float
    right: bool
    outside: int


class Projected(NamedTuple):
    """The new p and moments, and |S| as ``[]`` (``[0]`` without anything outside)."""

    p: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    norm: Tensor


def projected_step(
    p: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, previous: Tensor | None, rule: Rule
) -> Projected:
    """p and grad G ``[m, n]``; basis P ``[n, r]`` and moments ``[m, r]`` (right), or ``[m, r]`` and ``[r, n]``.

    ``R = G P`` (right) or ``P^T G``; M and V are Adam's moments of R, ``psi = M / (sqrt(V) + eps)``;
    ``phi = |psi| / (|R| + 1e-8)`` a row (right), a column or of the whole; ``|S|^2 = sum phi^2 max(0, |G|^2 - (2 scale
    - scale^2) |R|^2)``, which is that of ``S = (G - scale R P^T) phi`` for an orthonormal P. With a previous norm and a
    limit, ``l = max(|S| / (previous + 1e-8), limit) / limit`` divides phi and |S|. Then
    ``p = keep p - rate (scale (psi - R phi) P^T + G phi)``. In float32, float64 if p is.
    """
    return step_of_rows(p, grad, basis, exp_avg, exp_avg_sq, previous, rule, lambda part: part)


def step_of_rows(
    p: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, previous: Tensor | None, rule: Rule,
    total: Callable[[Tensor], Tensor],
) -> Projected:  # fmt: skip
    """`projected_step` of some rows of p and G, all others being elsewhere; ``total`` adds up what all of them found.

    With P on the right the moments are of these rows; on the left P is, and the moments are the same everywhere.
    """
    acc = accumulate_dtype(p, basis)
    g, base = grad.to(acc), basis.to(acc)
    low = g @ base if rule.right else total(base.t() @ g)
    first = torch.lerp(exp_avg, low, 1 - rule.beta1)
    second = (exp_avg_sq * rule.beta2).addcmul_(low, low, value=1 - rule.beta2)
    psi = first / (second.sqrt() + rule.eps)
    if OUTSIDE[rule.outside] == "none":
        back = psi @ base.t() if rule.right else base @ psi
        moved = torch.add(p.to(acc) * rule.keep, back, alpha=-rule.rate * rule.scale)
        return Projected(moved.to(p.dtype), first, second, p.new_empty(0, dtype=acc))
    whole = OUTSIDE[rule.outside] == "matrix"
    axis = (0, 1) if whole else 1 if rule.right else 0

    def length(x: Tensor, in_parts: bool) -> Tensor:
        found = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
        return total(found.square()).sqrt() if in_parts else found

    of_rows = rule.right and whole  # moments in parts, of which one number is wanted
    within = length(low, of_rows)
    phi = length(psi, of_rows) / (within + TINY)
    share = 2 * rule.scale - rule.scale * rule.scale
    left = (length(g, whole or not rule.right).square() - share * within.square()).clamp_min(0.0)
    square = (phi.square() * left).sum()
    size = (total(square) if rule.right and not whole else square).sqrt()
    if previous is not None and rule.limit > 0:
        growth = (size / (previous.to(acc) + TINY)).clamp_min(rule.limit) / rule.limit
        phi, size = phi / growth, size / growth
    inside = psi - low * phi
    back = inside @ base.t() if rule.right else base @ inside
    moved = p.to(acc) * rule.keep - rule.rate * (rule.scale * back + g * phi)
    return Projected(moved.to(p.dtype), first, second, size)
