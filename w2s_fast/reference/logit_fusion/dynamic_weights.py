"""Dynamic fusion weights (Dynamic Logits Fusion, arXiv 2406.15480), solved by evaluating the KL in float64.

One row, one direction: p = softmax(base) is tilted by x = u.d, d_k = experts_k - anti_k,

    P_t = softmax(base + t x),    F(t) = KL(P_t || p) = t E_{P_t} x - A(t),    A(t) = log sum_v p_v exp(t x_v),

F' = t Var_{P_t} x >= 0, so F(t) = T has at most one root in (0, alpha_max].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype, difference, log_sum_exp
from .arguments import DECOUPLED, EXACT, GRID, Solve, Solved
from .fuse import shifts

#: KL below this is rounding error of the float64 evaluation: the shift is constant, or there is nothing to reach.
FLOOR = 64 * 2.0**-52
#: How far from the center an infinite shift is put.
FAR = 60.0


class Tilts(NamedTuple):
    """What the solver needs of the logits, all float64.

    Fields: logp ``[B, V]``, log softmax(base), -inf where masked; shift, K of ``[B, V]``; kl ``[B, K]`` = KL(Q_k||Q_0).
    """

    logp: Tensor
    shift: list[Tensor]
    kl: Tensor


def log_probabilities(x: Tensor, vocab_size: int) -> Tensor:
    """Log softmax in float64 of the first ``vocab_size`` columns; the maximum is taken off first, so offsets are free.

    NaN for a row without a finite entry.
    """
    x = x[:, :vocab_size].double()
    x = x - x.amax(-1, keepdim=True)
    return x - log_sum_exp(x).unsqueeze(1)


def _lse(x: Tensor, vocab_size: int) -> Tensor:
    return log_sum_exp(x[:, :vocab_size].double())


def tilts(base: Tensor, experts: Sequence[Tensor], anti: Sequence[Tensor], vocab_size: int) -> Tilts:
    """Log-probabilities, shifts and KL of each expert.

    The shift is d_k as `fuse_logits` takes it (0 for a token that both mask), but an infinite d_k, a token that one of
    the two masks, stands 60 above or below the difference of their log-sum-exps, so that arithmetic stays finite. A
    token that base masks is not shifted. A term of the KL with Q_k = 0 is 0; the KL is +inf where Q_k > 0 = Q_0.
    """
    logp = log_probabilities(base, vocab_size)
    logq = [log_probabilities(t, vocab_size) for t in experts]
    log0 = [log_probabilities(t, vocab_size) for t in anti]
    shift, kl = [], []
    for k, d in enumerate(shifts(experts, anti, vocab_size, torch.float64)):
        own = 0 if len(anti) == 1 else k
        ratio = difference(logq[k], log0[own])
        kl.append(torch.where(logq[k] == -math.inf, 0.0, logq[k].exp() * ratio).sum(-1).clamp_min(0.0))
        center = log_sum_exp(experts[k][:, :vocab_size].double()) - log_sum_exp(anti[own][:, :vocab_size].double())
        d = torch.where(d.isinf(), center.unsqueeze(1) + d.sign() * FAR, d)
        shift.append(torch.where(logp == -math.inf, 0.0, d))
    return Tilts(logp, shift, torch.stack(kl, 1))


def tilted(logp: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P_t ``[B, V]`` and F(t), E_{P_t} x, Var_{P_t} x, each ``[B]``."""
    exponent = logp + t.unsqueeze(1) * x
    log_sum = log_sum_exp(exponent)
    p = (exponent - log_sum.unsqueeze(1)).exp()
    mean = (p * x).sum(-1)
    variance = (p * (x - mean.unsqueeze(1)).square()).sum(-1)
    return p, (t * mean - log_sum).clamp_min(0.0), mean, variance


def solve(logp: Tensor, x: Tensor, target: Tensor, alpha_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """t ``[B]`` in [0, alpha_max] with F(t) = target, F(t) and saturated, to the precision of float64.

    t = 0 where target <= 0 or F is identically 0; t = alpha_max and saturated where F(alpha_max) <= target; NaN where
    anything is NaN. Newton on G = sqrt(2 F), which is close to linear, within a bracket that a step never leaves.
    """
    x = x - (logp.exp() * x).sum(-1, keepdim=True)
    end = torch.full_like(target, alpha_max)
    reach = tilted(logp, x, end)[1]
    flat = (target <= FLOOR) | (reach <= FLOOR)
    saturated = ~flat & (reach <= target)
    broken = reach.isnan() | target.isnan()
    low, high = torch.zeros_like(end), end.clone()
    t = torch.full_like(end, min(1.0, alpha_max / 2))
    goal = torch.where(torch.isfinite(target), target, 0.0)
    for _ in range(64):
        _, found, _, variance = tilted(logp, x, t)
        done = flat | saturated | broken | ((found - goal).abs() <= 1e-14 * goal.clamp_max(1.0))
        done |= (high - low) <= 2.0**-52 * alpha_max
        if bool(done.all()):
            break
        low, high = torch.where(found < goal, t, low), torch.where(found < goal, high, t)
        root = (2 * found).sqrt()
        step = t - (root - (2 * goal).sqrt()) * root / (t * variance)
        inside = (step > low) & (step < high)
        t = torch.where(done, t, torch.where(inside, step, (low + high) / 2))
    t = torch.where(saturated, end, torch.where(flat, 0.0, t))
    t = torch.where(broken, math.nan, t)
    return t, tilted(logp, x, t)[1], saturated


def search(
    logp: Tensor, x: Tensor, target: Tensor, alpha_max: float, nodes: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's search: t = argmin_j (F(t_j) - target)^2 over t_j = j alpha_max / nodes, j = first..nodes.

    Ties go to the smaller t. An infinite target takes the last node. saturated where F(alpha_max) <= target.
    """
    x = x - (logp.exp() * x).sum(-1, keepdim=True)
    steps = torch.arange(first, nodes + 1, device=x.device, dtype=x.dtype) * (alpha_max / nodes)
    found = torch.stack([tilted(logp, x, t.expand_as(target))[1] for t in steps], 1)
    misfit = (found - target.unsqueeze(1)).square()
    best = (misfit == misfit.amin(1, keepdim=True)).to(torch.uint8).argmax(1)
    best = torch.where(target == math.inf, len(steps) - 1, best)
    broken = found.isnan().any(1) | target.isnan()
    saturated = ~broken & (found[:, -1] > FLOOR) & (found[:, -1] <= target)
    achieved = found.gather(1, best.unsqueeze(1)).squeeze(1)
    return torch.where(broken, math.nan, steps[best]), torch.where(broken, math.nan, achieved), saturated


def search_product(
    logp: Tensor, shift: Sequence[Tensor], target: Tensor, alpha_max: float, nodes: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The search over all combinations of nodes; the first minimiser in lexicographic order. Costs nodes^K passes.

    sum_k (F - T_k)^2 = K (F - mean T)^2 + const, so only the mean of ``target [B, K]`` counts. Returns alpha
    ``[B, K]``, F ``[B]`` and saturated ``[B]``: the mean is not below any candidate's F.
    """
    goal = target.mean(1)
    best = torch.full_like(goal, math.inf)
    alpha, achieved = torch.full_like(target, math.nan), torch.full_like(goal, math.nan)
    largest, one = torch.zeros_like(goal), torch.ones_like(goal)
    for indices in itertools.product(range(first, nodes + 1), repeat=len(shift)):
        point = target.new_tensor(indices) * (alpha_max / nodes)
        found = tilted(logp, sum(a * x for a, x in zip(point, shift, strict=True)), one)[1]  # type: ignore[arg-type]
        misfit = torch.where(goal == math.inf, -found, (found - goal).square())
        better = misfit < best
        best = torch.where(better, misfit, best)
        alpha = torch.where(better.unsqueeze(1), point, alpha)
        achieved = torch.where(better, found, achieved)
        largest = torch.maximum(largest, found)
    return alpha, achieved, (largest > FLOOR) & (largest <= goal)


def ray_direction(kind: int, direction: Tensor | None, kl: Tensor) -> Tensor:
    """u ``[B, K]``, its largest entry 1: ones (kind 0), proportional to the KL (1), or the given direction (2).

    A row without a positive entry gets 0, or ones where it is the KL that is 0.
    """
    if kind == 0:
        return torch.ones_like(kl)
    u = kl if kind == 1 else direction
    assert u is not None
    u = u.double()
    largest = u.amax(1, keepdim=True)
    scaled = torch.where(largest == math.inf, (u == math.inf).to(u.dtype), u / largest)
    return torch.where(largest == 0, 1.0 if kind == 1 else 0.0, scaled)


def dynamic_fusion_weights(given: Solve) -> Solved:
    """Weights alpha ``[B, K]`` in [0, alpha_max] with KL(P_alpha || P_base) = T, T_k = KL(Q_k || Q_0) or ``target_kl``.

    ``multi``: 0 ray, alpha = t u and T = mean T_k; 1 decoupled, K problems of one expert each (their alpha divided
    by K with ``average``); 2 product grid. ``first_candidate`` -1 solves exactly (``nodes`` and ``tol`` are not used
    here), 0 or 1 searches the grid of ``nodes`` steps from that node on.

    A row whose base has no finite logit, or where NaN or an expert without a finite logit enters, gets alpha NaN.

    Returns:
        alpha, T_k ``[B, K]``, achieved KL (``[B, K]`` decoupled, otherwise ``[B, 1]``), saturated ``[B, K]`` bool.
    """
    logp, shift, kl = tilts(given.base, given.experts, given.anti, given.vocab_size)
    target = kl if given.target_kl is None else given.target_kl.double()
    alpha_max, nodes, first = given.alpha_max, given.nodes, given.first_candidate

    def one(x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if first == EXACT:
            return solve(logp, x, goal, alpha_max)
        return search(logp, x, goal, alpha_max, nodes, first)

    if given.multi == DECOUPLED:
        results = [one(x, target[:, k]) for k, x in enumerate(shift)]
        alpha, achieved, saturated = (torch.stack(parts, 1) for parts in zip(*results, strict=True))
        alpha = alpha / len(shift) if given.average else alpha
    elif given.multi == GRID:
        alpha, achieved, saturated = search_product(logp, shift, target, alpha_max, nodes, first)
        achieved, saturated = achieved.unsqueeze(1), saturated.unsqueeze(1).expand_as(alpha)
    else:
        u = ray_direction(given.direction_kind, given.direction, target)
        x = torch.stack([u[:, k : k + 1] * d for k, d in enumerate(shift)]).sum(0)
        t, achieved, saturated = one(x, target.mean(1))
        alpha, achieved = t.unsqueeze(1) * u, achieved.unsqueeze(1)
        saturated = saturated.unsqueeze(1).expand_as(alpha)
    dtype = accumulate_dtype(given.base, *given.experts, *given.anti)
    return Solved(alpha.to(dtype), target.to(dtype), achieved.to(dtype), saturated.contiguous())
