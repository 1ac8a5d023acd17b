"""What is right, in float64, and how outputs of different form are held to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._logits import GRID


class Tilt(NamedTuple):
    """One problem of dynamic weights in float64: logits, shift and target KL."""

    base: Tensor
    shift: Tensor
    target: Tensor

    def kl(self, alpha: Tensor) -> Tensor:
        """KL(P_alpha || P_base) ``[B]``."""
        p, q = self.base.log_softmax(-1), (self.base + alpha[:, None] * self.shift).log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1)


def tilt(base: Tensor, *small: Tensor) -> Tilt:
    """The float64 problem of the same rounded inputs; several experts share one weight (a ray)."""
    base, *experts, anti = (z.double() for z in (base, *small))
    l0 = anti.log_softmax(-1)
    targets = torch.stack([(lk.exp() * (lk - l0)).sum(-1) for lk in (z.log_softmax(-1) for z in experts)])
    return Tilt(base, sum((e - anti for e in experts), torch.zeros_like(base)), targets.mean(0))


def exact_weights(tol: float, alpha_max: float = 2.0) -> Callable[[Any, Tilt], float]:
    """Compares alpha ``[B]``: the KL must meet the target to ``tol``, or alpha be at its maximum below it."""

    def compare(alpha: Any, expected: Tilt) -> float:
        alpha = alpha.double()
        if alpha.shape != expected.target.shape:
            raise ValueError(f"alpha must have shape {tuple(expected.target.shape)}, got {tuple(alpha.shape)}")
        miss = expected.kl(alpha) - expected.target
        saturated = (alpha >= alpha_max * (1 - 1e-6)) & (miss < 0)
        allowed = tol * expected.target.clamp_min(1.0)
        worst = float((torch.where(saturated, 0.0, miss.abs()) / allowed).max())
        return worst if math.isfinite(worst) else math.inf

    return compare


def grid_weights(slack: float = 1e-4) -> Callable[[Any, Tilt], float]:
    """Compares a grid search's alpha: no candidate may miss the target by more than ``slack`` nats less."""

    def compare(alpha: Any, expected: Tilt) -> float:
        misses = [(expected.kl(torch.full_like(expected.target, a)) - expected.target).abs() for a in GRID]
        chosen = (expected.kl(alpha.double().reshape(-1)) - expected.target).abs()
        on_grid = (alpha.double().reshape(-1, 1) - torch.tensor(GRID, device=alpha.device)).abs().amin(-1) < 1e-5
        worst = float(((chosen - torch.stack(misses).amin(0)) / slack).max())
        return worst if math.isfinite(worst) and bool(on_grid.all()) else math.inf

    return compare


class Draw(NamedTuple):
    """The distribution to draw from in float64, after filters, and before them; the uniforms."""

    kept: Tensor
    logp: Tensor
    uniform: Tensor


def filtered(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """float64 probabilities after top-k, then top-p of what remains (value descending, index ascending)."""
    values, order = z.sort(stable=True, dim=-1, descending=True)
    p = values.softmax(-1)
    if top_k:
        p[:, top_k:] = 0.0
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1.0:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    p = p / p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, order, p)


def draw(z: Tensor, uniform: Tensor, top_k: int = 0, top_p: float = 1.0) -> Draw:
    """The float64 answer for fused, scaled logits ``z``."""
    z = z.double()
    return Draw(filtered(z, top_k, top_p), z.log_softmax(-1), uniform.double())


def inverse_cdf_token(slack: float = 1e-4) -> Callable[[Any, Draw], float]:
    """Compares a token, or ``(token, logprob)``: the uniform must lie in its stretch of the CDF to ``slack``."""

    def compare(actual: Any, expected: Draw) -> float:
        token, logprob = actual if isinstance(actual, tuple) else (actual, None)
        index = token.reshape(-1, 1)
        if bool((index < 0).any()) or bool((expected.kept.gather(1, index) <= 0).any()):
            return math.inf
        end = expected.kept.cumsum(-1).gather(1, index)[:, 0]
        begin = end - expected.kept.gather(1, index)[:, 0]
        u = expected.uniform
        error = float(torch.maximum(begin - u, u - end).clamp_min(0).max()) / slack
        if logprob is not None:
            error = max(error, float((logprob.double() - expected.logp.gather(1, index)[:, 0]).abs().max()) / 1e-3)
        return error

    return compare


def same_distribution(slack: float) -> Callable[[Any, Draw], float]:
    """Compares ``(probabilities, token)``: total variation at most ``slack``, and a token that has mass."""

    def compare(actual: Any, expected: Draw) -> float:
        p, token = actual
        distance = float((p.double() - expected.kept).abs().sum(-1).max()) / 2
        has_mass = bool((p.gather(1, token.reshape(-1, 1)) > 0).all())
        return distance / slack if has_mass else math.inf

    return compare


def kept_token(actual: Any, expected: Draw) -> float:
    """Compares a random token: it must be one of the kept ones."""
    mass = expected.kept.gather(1, actual.long().reshape(-1, 1))
    return 0.0 if bool((mass > 0).all()) else math.inf
