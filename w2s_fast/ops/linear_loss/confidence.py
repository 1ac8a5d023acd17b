"""The losses of weak-to-strong generalization (arXiv 2312.09390): soft labels of a weak model, and the own guess."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks

Balance = Literal["weak_prior", "median", "none"]
OP = "w2s_confidence_loss"


def confidence_ramp(
    step: int, total: int, coef: float, warmup_frac: float, mode: Literal["official", "linear"] = "official"
) -> float:
    """The confidence coefficient at a step; x = step / total.

    Args:
        step, total: in [0, total], total >= 1.
        coef: the coefficient after the warm-up.
        warmup_frac: length of the warm-up as a fraction of the training, in [0, 1].
        mode: ``"official"`` (the authors' code): coef x during the warm-up, which then jumps to coef; ``"linear"`` (the
            paper): ``coef min(1, x / warmup_frac)``.

    Returns:
        The coefficient.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import w2s_fast
        >>> w2s_fast.confidence_ramp(5, 100, 0.5, 0.1), w2s_fast.confidence_ramp(5, 100, 0.5, 0.1, "linear")
        (0.025, 0.25)
    """
    op = "confidence_ramp"
    total = checks.integer(op, "total", total, low=1)
    x = checks.integer(op, "step", step, low=0, high=total) / total
    coef = checks.number(op, "coef", coef, low=0.0, high=1.0)
    warmup_frac = checks.number(op, "warmup_frac", warmup_frac, low=0.0, high=1.0)
    if checks.choice(op, "mode", mode, ("official", "linear")) == "linear":
        return coef * min(1.0, x / warmup_frac) if warmup_frac else coef
    return coef if x > warmup_frac else coef * x


def w2s_confidence_loss(
    logits: Tensor,
    soft_labels: Tensor,
    *,
    coef: float = 0.5,
    balance: Balance = "weak_prior",
    threshold: float | Tensor | None = None,
    kind: Literal["logconf", "product", "xent"] = "logconf",
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Cross-entropy with a mixture of a weak model's soft labels and the model's own hardened prediction.

    With p = softmax(logits) and w the soft labels, ``loss = -(1 / B) sum_i sum_c t_ic log p_ic``; no gradient goes
    through the target t:

    - logconf: ``t = (1 - coef) w + coef hard``. With C = 2, hard is class 0 where ``p_0 >= threshold``, which is chosen
      in the batch so that the hardened labels are balanced. With ``balance="weak_prior"`` (the authors' code) it is the
      quantile of p_0 at the mean of w_1: the hardened labels have the weak labels' prior. With ``"median"`` (the paper)
      half of the batch is above it, with ``"none"`` it is 1/2. With C > 2, hard is the class of the largest log p_c,
      less log(mean p_c / mean w_c) for ``"weak_prior"``.
    - product: t proportional to ``p^beta w^alpha``.
    - xent: ``t = w``.

    Args:
        logits: ``[B, C]``, C >= 2; or ``[B]`` with soft labels ``[B]``, the logit and the weak probability of class 1.
        soft_labels: ``[B, C]`` probabilities.
        coef: weight of the own prediction in [0, 1]; see `confidence_ramp`.
        balance: see above; the whole batch must be present unless a threshold is given.
        threshold: on p_0, for C = 2: instead of the batch's own (of a batch that comes in parts, say).
        kind: see above.
        alpha, beta: exponents of ``"product"``.

    Returns:
        loss, a float32 scalar (float64 for float64 logits; 0 for B = 0), differentiable in logits: (p - t) / B.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for soft labels outside [0, 1].

    Example:
        >>> import torch, w2s_fast
        >>> logits, weak = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> round(w2s_fast.w2s_confidence_loss(logits, weak, coef=0.5).item(), 4)
        0.8451
    """
    checks.choice(OP, "kind", kind, ("logconf", "product", "xent"))
    checks.choice(OP, "balance", balance, ("weak_prior", "median", "none"))
    coef = checks.number(OP, "coef", coef, low=0.0, high=1.0)
    z, weak = _inputs(logits, soft_labels)
    logp = z.log_softmax(-1)
    with torch.no_grad():
        if kind == "product":
            alpha, beta = checks.number(OP, "alpha", alpha), checks.number(OP, "beta", beta)
            # an exponent of 0 leaves a factor out, where 0 * log 0 would be NaN
            target = (
                (beta * logp if beta else 0.0) + (alpha * weak.log() if alpha else torch.zeros_like(logp))
            ).softmax(-1)
        elif kind == "xent" or coef == 0 or not z.shape[0]:
            target = weak
        else:
            target = (1 - coef) * weak + coef * _harden(logp, weak, balance, threshold)
    # a class of target 0 adds 0, also where its log-probability is -inf
    return -torch.where(target > 0, target * logp, 0.0).sum() / max(z.shape[0], 1)


def _inputs(logits: Any, soft_labels: Any) -> tuple[Tensor, Tensor]:
    """Both as ``[B, C]``, wide."""
    checks.is_float_tensor(OP, "logits", logits)
    checks.is_float_tensor(OP, "soft_labels", soft_labels)
    if soft_labels.shape != logits.shape:
        checks.fail(OP, "soft_labels", f"of the shape of logits {tuple(logits.shape)}", tuple(soft_labels.shape))
    if logits.ndim not in (1, 2) or (logits.ndim == 2 and logits.shape[1] < 2):
        checks.fail(OP, "logits", "of shape [B, C] with C >= 2, or [B]", tuple(logits.shape))
    checks.same_device(OP, [("logits", logits), ("soft_labels", soft_labels)])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weak = soft_labels.detach().to(z.dtype)
    if weak.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((weak < 0) | (weak > 1)).any()):
        checks.fail(OP, "soft_labels", "in [0, 1]", weak[(weak < 0) | (weak > 1)][0].item())
    if z.ndim == 1:
        return torch.stack((torch.zeros_like(z), z), 1), torch.stack((1 - weak, weak), 1)
    return z, weak


def _harden(logp: Tensor, weak: Tensor, balance: str, threshold: Any) -> Tensor:
    """One-hot guesses ``[B, C]``."""
    p, classes = logp.exp(), logp.shape[1]
    if classes == 2:
        if threshold is None and balance == "none":
            threshold = 0.5
        elif threshold is None:
            threshold = _quantile(p[:, 0], weak[:, 1].mean() if balance == "weak_prior" else 0.5)
        elif not isinstance(threshold, Tensor):
            threshold = checks.number(OP, "threshold", threshold)
        first = p[:, 0] >= threshold
        return torch.stack((first, ~first), 1).to(logp.dtype)
    if threshold is not None:
        checks.fail(OP, "threshold", "None for more than two classes", type(threshold).__name__)
    if balance == "median":
        checks.fail(OP, "balance", "'weak_prior' or 'none' for more than two classes", repr(balance))
    if balance == "weak_prior":
        logp = logp - (p.mean(0) / weak.mean(0)).log()
    return torch.nn.functional.one_hot(logp.argmax(1), classes).to(logp.dtype)


def _quantile(x: Tensor, q: Tensor | float) -> Tensor:
    """Linear interpolation between order statistics; a q off [0, 1] by rounding is taken as its end."""
    return torch.quantile(x, torch.as_tensor(q, dtype=x.dtype, device=x.device).clamp(0, 1))
