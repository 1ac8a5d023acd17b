"""projected_step: one step of GaLore or Fira on one matrix."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ... import checks, dispatch
from ...library import Kernel, define
from ...reference.numerics import accumulate_dtype
from ...reference.optimizers import projected_step as reference
from ...reference.optimizers.projected_step import OUTSIDE, Projected, Rule

Outside = Literal["none", "column", "matrix"]


def _fake(
    p: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, previous: Tensor | None, rule: Rule
) -> tuple[Tensor, ...]:  # fmt: skip
    norm = p.new_empty(() if rule.outside else 0, dtype=basis.dtype)
    return (*(t.new_empty(t.shape) for t in (p, exp_avg, exp_avg_sq)), norm)


PROJECTED_STEP = define(reference.projected_step, fake=_fake, carriers="", triton=Kernel())


def projected_step(
    p: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    right: bool = True,
    outside: Outside = "none",
    previous: Tensor | None = None,
    limit: float | None = 1.01,
) -> Projected:
    r"""One step of GaLore (arXiv 2403.03507) or Fira (arXiv 2410.01623) on one matrix, in two products.

    .. code-block:: text

        R = G P                                        P on the right; on the left R = P^T G and the rest transposes
        M = b1 M + (1 - b1) R,  V = b2 V + (1 - b2) R^2,  psi = M / (sqrt(V) + eps)
        eta = lr sqrt(1 - b2^step) / (1 - b1^step)
        phi_i = |psi_i| / (|R_i| + 1e-8)               a row of R ("column" of the long axis), or all of R ("matrix")
        S = (G - scale R P^T) * phi,  l = max(|S| / (previous + 1e-8), limit) / limit,  S = S / l
        p = (p - eta (scale psi P^T + S)) (1 - lr weight_decay)           "none": S = 0, which is GaLore

    S is never formed: ``scale (psi - R phi/l) P^T + G phi/l`` has one product instead of two, and ``|S|^2 = sum_i
    phi_i^2 max(0, |G_i|^2 - (2 scale - scale^2) |R_i|^2)`` since P is orthonormal.

    Args:
        p, grad: ``[m, n]``; float32, bfloat16, float16 or float64 (both).
        basis: P, orthonormal columns ``[n, r]`` (right) or ``[m, r]``; float32, float64 for float64 p.
        exp_avg, exp_avg_sq: M and V, ``[m, r]`` (right) or ``[r, n]``, of the dtype of basis.
        step: of this step, from 1.
        lr, betas, eps, weight_decay: as in `w2s_fast.optim.GaLore`.
        scale: of the update.
        right: the side of P.
        outside: what becomes of the gradient outside the subspace; see above.
        previous: |S| of the step before, one number; None: no limit to its growth.
        limit: of the growth; None: no limiter.

    Returns:
        Projected: p, exp_avg, exp_avg_sq, all new, and norm ``[]``, |S| / l (``[0]`` for "none"). Without gradients.
        Memory beside them: R and psi, and on a CPU a panel of p. `w2s_fast.optim.GaLore` and `Fira` step in place.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> p, grad, basis = torch.ones(2, 1), torch.tensor([[0.5], [-0.5]]), torch.ones(1, 1)
        >>> zero = torch.zeros(2, 1)
        >>> w2s_fast.projected_step(p, grad, basis, zero, zero, step=1, lr=0.1, scale=1.0).p
        tensor([[0.9000],
                [1.1000]])
    """
    op = "projected_step"
    for name, value in (("p", p), ("grad", grad), ("basis", basis), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        checks.is_float_tensor(op, name, value)
    if p.ndim != 2:
        checks.fail(op, "p", "of shape (m, n)", tuple(p.shape))
    m, n = p.shape
    if grad.shape != p.shape:
        checks.fail(op, "grad", f"of the shape of p, {(m, n)}", tuple(grad.shape))
    if (grad.dtype == torch.float64) != (p.dtype == torch.float64):
        checks.fail(op, "grad", f"float64 where p is, {p.dtype}", grad.dtype, error=TypeError)
    side = n if right else m
    if basis.ndim != 2 or basis.shape[0] != side:
        checks.fail(op, "basis", f"of shape ({side}, r)", tuple(basis.shape))
    state = (m, basis.shape[1]) if right else (basis.shape[1], n)
    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value.shape != state:
            checks.fail(op, name, f"of shape {state}", tuple(value.shape))
    for name, value in (("basis", basis), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value.dtype != accumulate_dtype(p):
            checks.fail(op, name, str(accumulate_dtype(p))[6:], value.dtype, error=TypeError)
    if previous is not None:
        checks.is_float_tensor(op, "previous", previous)
        if previous.numel() != 1:
            checks.fail(op, "previous", "one number", tuple(previous.shape))
    checks.same_device(
        op, [("p", p), ("grad", grad), ("basis", basis), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq),
             ("previous", previous)],
    )  # fmt: skip
    checks.number(op, "lr", lr, low=0.0)
    checks.number(op, "eps", eps, low=0.0)
    checks.number(op, "weight_decay", weight_decay, low=0.0)
    checks.number(op, "scale", scale, low=0.0)
    checks.integer(op, "step", step, low=1)
    pair = "two numbers in [0, 1)"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        checks.fail(op, "betas", pair, f"{type(betas).__name__} {betas!r}", error=TypeError)
    for beta in betas:
        if checks.number(op, "betas", beta, low=0.0, high=1.0, requirement=pair) == 1:
            checks.fail(op, "betas", pair, betas)
    checks.choice(op, "outside", outside, OUTSIDE)
    if limit is not None:
        checks.number(op, "limit", limit, low=1.0)
    rule = rule_of(step, lr, betas, eps, weight_decay, scale, right, outside, limit)
    tensors = [t.detach() for t in (p, grad, basis, exp_avg, exp_avg_sq)]
    before = None if previous is None else previous.detach().reshape(())
    found: Projected = PROJECTED_STEP(*tensors, before, rule)
    return found


def rule_of(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: float, right: bool,
    outside: str, limit: float | None,
) -> Rule:  # fmt: skip
    """The numbers of a step."""
    keep = 1 - lr * weight_decay
    rate = keep * lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    return Rule(*betas, eps, rate, keep, scale, limit or 0.0, right, OUTSIDE.index(outside))


def step_in_place(
    p: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, previous: Tensor | None, rule: Rule
) -> Tensor:  # fmt: skip
    """|S|; p and the moments are changed. On a CPU without a copy of them."""
    given = (p, grad, exp_avg, exp_avg_sq)
    ours = p.device.type == "cpu" and PROJECTED_STEP.has_cpp() and dispatch.STATE in ("auto", "cpp")
    if ours and all(t.is_contiguous() for t in given) and not torch.compiler.is_compiling():
        norm: Tensor = torch.ops.w2s_fast.projected_step_(p, grad, basis, exp_avg, exp_avg_sq, previous, *rule)
        return norm
    found: Projected = PROJECTED_STEP(p, grad, basis, exp_avg, exp_avg_sq, previous, rule)
    for t, new in zip((p, exp_avg, exp_avg_sq), found, strict=False):
        t.copy_(new)
    return found.norm
