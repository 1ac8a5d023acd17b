"""The losses of weak-to-strong generalization (arXiv 2312.09390): soft labels of a weak model, and the own guess."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks, dispatch, extension, transforms
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import confidence as reference
from ...reference.linear_loss.confidence import BALANCES
from ...reference.numerics import accumulate_dtype
from ..layout import separate_rows
from ..stored import scaled

Balance = Literal["weak_prior", "median", "none"]
KINDS = ("logconf", "product", "xent")
NAME = "w2s_confidence_loss"


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


def _fake(
    logits: Tensor, soft_labels: Tensor, product: bool, coef: float, alpha: float, beta: float, balance: int,
    threshold: Tensor | None, need_loss: bool, need_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = accumulate_dtype(logits)
    classes = 2 if logits.ndim == 1 else logits.shape[1]
    made = not product and coef > 0 and threshold is None
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((0,) if not made else (1,) if classes == 2 else (classes,), dtype=dtype),
        logits.new_empty(logits.shape if need_gradient else (0,)),
    )


def _backward(call: Call, grads: reference.Confidence) -> dict[str, Any]:
    dlogits = call.out.dlogits
    if not call.need_gradient:
        dlogits = W2S_CONFIDENCE_LOSS.on(call.backend)(
            call.logits, call.soft_labels, call.product, call.coef, call.alpha, call.beta, call.balance, call.threshold,
            need_loss=True, need_gradient=True,
        ).dlogits  # fmt: skip
    return {"logits": scaled(grads.loss, [dlogits])[0]}


W2S_CONFIDENCE_LOSS = define(
    reference.w2s_confidence_loss,
    fake=_fake,
    backward=_backward,
    # of a gradient that is made already the logits only say what it depends on
    saves=lambda call: "logits dlogits" if call.need_gradient else "logits soft_labels threshold",
    carriers="loss",
    triton=Kernel(rowwise="logits soft_labels"),
)


def _outside(op: str, soft_labels: Tensor) -> None:
    """An error for labels off [0, 1]."""
    if soft_labels.numel():
        low, high = soft_labels.aminmax()  # one read; NaN, which may hide others, goes on
        if low >= 0 and high <= 1:
            return
    bad = (soft_labels < 0) | (soft_labels > 1)
    if bool(bad.any()):
        checks.fail(op, "soft_labels", "in [0, 1]", soft_labels[bad][0].item())


def _inputs(op: str, logits: Any, soft_labels: Any) -> tuple[Tensor, Tensor]:
    """Both as the kernels take them."""
    checks.is_float_tensor(op, "logits", logits)
    checks.is_float_tensor(op, "soft_labels", soft_labels)
    if soft_labels.shape != logits.shape:
        checks.fail(op, "soft_labels", f"of the shape of logits {tuple(logits.shape)}", tuple(soft_labels.shape))
    if logits.ndim not in (1, 2) or (logits.ndim == 2 and logits.shape[1] < 2):
        checks.fail(op, "logits", "of shape [B, C] with C >= 2, or [B]", tuple(logits.shape))
    if soft_labels.device != logits.device:
        checks.same_device(op, [("logits", logits), ("soft_labels", soft_labels)])
    if soft_labels.requires_grad:
        soft_labels = soft_labels.detach()
    return _rows(logits), _rows(soft_labels)


def _rows(t: Tensor) -> Tensor:
    return t.contiguous() if t.ndim == 1 else separate_rows(t)


def _threshold(op: str, logits: Tensor, balance: str, threshold: Any) -> Tensor | None:
    """``threshold`` as the kernels take it."""
    classes = 2 if logits.ndim == 1 else logits.shape[1]
    if classes > 2 and balance == "median":
        checks.fail(op, "balance", "'weak_prior' or 'none' for more than two classes", repr(balance))
    if threshold is None:
        return None
    dtype = accumulate_dtype(logits)
    if not isinstance(threshold, Tensor):
        if classes > 2:
            checks.fail(op, "threshold", f"None or of shape [{classes}]", type(threshold).__name__)
        return logits.new_full((1,), checks.number(op, "threshold", threshold), dtype=dtype)
    if threshold.shape not in (((), (1,)) if classes == 2 else ((classes,),)):
        wanted = "a number, or of shape [] or [1]" if classes == 2 else f"None or of shape [{classes}]"
        checks.fail(op, "threshold", wanted, tuple(threshold.shape))
    checks.same_device(op, [("logits", logits), ("threshold", threshold)])
    return threshold.detach().to(dtype).reshape(-1)


def _plain_threshold(logits: Tensor, soft_labels: Tensor, *, balance: Balance = "weak_prior") -> Any:
    if balance != "weak_prior" or logits.ndim != 2 or logits.shape[1] == 2:
        return NotImplemented
    low, high = soft_labels.aminmax()
    if not (low.item() >= 0 and high.item() <= 1):
        return NotImplemented
    logits, wide = logits.detach(), accumulate_dtype(logits)
    guess = logits.softmax(-1, dtype=wide).mean(0).clamp_min_(2.0**-126)
    return guess.div_(soft_labels.detach().mean(0, dtype=wide)).log_()


@or_plain(_plain_threshold, replayed=True)
def confidence_threshold(logits: Tensor, soft_labels: Tensor, *, balance: Balance = "weak_prior") -> Tensor:
    """The threshold that `w2s_confidence_loss` chooses in a whole batch, for a batch whose loss is taken in parts.

    Args:
        logits: as in `w2s_confidence_loss`, of the whole batch.
        soft_labels: of the same shape.
        balance: with C = 2 the quantile of p_0 at the mean of w_1 (``"weak_prior"``), at 1/2 (``"median"``) or 1/2
            itself (``"none"``); with C > 2 ``log(mean p_c / mean w_c)``, mean p_c at least 2^-126 (``"weak_prior"``),
            or 0 (``"none"``).

    Returns:
        ``[1]`` for C = 2, ``[C]`` for more classes; float32 (float64 for float64 logits), without a gradient.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for soft labels outside [0, 1].

    Example:
        >>> import torch, w2s_fast
        >>> logits, weak = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> threshold = w2s_fast.confidence_threshold(logits, weak)
        >>> halves = [w2s_fast.w2s_confidence_loss(logits[i:i+1], weak[i:i+1], threshold=threshold) for i in (0, 1)]
        >>> round(float(sum(halves)) / 2, 4)
        0.8451
    """
    op = "confidence_threshold"
    checks.choice(op, "balance", balance, BALANCES)
    z, weak = _inputs(op, logits, soft_labels)
    _threshold(op, z, balance, None)
    settings = (False, 1.0, 1.0, 1.0, BALANCES.index(balance), None, False, False)
    if not checks.readable(z):
        found: reference.Confidence = W2S_CONFIDENCE_LOSS(z.detach(), weak, *settings)
        return found.threshold_made
    if extension.ERROR is not None or dispatch.STATE not in ("auto", "cpp", "explain"):
        _outside(op, weak)
    try:
        found = W2S_CONFIDENCE_LOSS(z.detach(), weak, *settings)
    except RuntimeError:  # the C++ kernel looks at the labels while it reads them
        _outside(op, weak)
        raise
    return found.threshold_made


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
    - product: t proportional to ``p^beta w^alpha``; a row in which that is 0 everywhere has the loss 0.
    - xent: ``t = w``.

    Args:
        logits: ``[B, C]``, C >= 2; or ``[B]`` with soft labels ``[B]``, the logit and the weak probability of class 1.
        soft_labels: ``[B, C]`` probabilities.
        coef: weight of the own prediction in [0, 1]; see `confidence_ramp`.
        balance: see above; the whole batch must be present unless a threshold is given.
        threshold: in place of the batch's own, for a batch that comes in parts: on p_0 with C = 2 (a number or a
            tensor), ``[C]`` with C > 2, taken from log p_c. `confidence_threshold` makes it from the whole batch.
        kind: see above.
        alpha, beta: exponents of ``"product"``; with a negative alpha a soft label of 0 gives NaN.

    Returns:
        loss, a float32 scalar (float64 for float64 logits; 0 for B = 0), differentiable, once, in logits:
        (p sum_c t_c - t) / B, made in forward (as many bytes as logits). Deterministic.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for soft labels outside [0, 1].

    Example:
        >>> import torch, w2s_fast
        >>> logits, weak = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> round(w2s_fast.w2s_confidence_loss(logits, weak, coef=0.5).item(), 4)
        0.8451
    """
    checks.choice(NAME, "kind", kind, KINDS)
    checks.choice(NAME, "balance", balance, BALANCES)
    coef = checks.number(NAME, "coef", coef, low=0.0, high=1.0)
    z, weak = _inputs(NAME, logits, soft_labels)
    product = kind == "product"
    if product:
        alpha, beta = checks.number(NAME, "alpha", alpha), checks.number(NAME, "beta", beta)
    else:
        alpha = beta = 1.0
    if kind != "logconf":
        coef, threshold = 0.0, None
    elif coef > 0:
        threshold = _threshold(NAME, z, balance, threshold)
    else:
        threshold = None
    settings = (product, coef, alpha, beta, BALANCES.index(balance), threshold, True)
    if torch.compiler.is_compiling() or transforms.active():
        loss: Tensor = W2S_CONFIDENCE_LOSS(z, weak, *settings, transforms.wants_grad(z)).loss
        return loss
    if z.device.type == "cpu" and (extension.ERROR is not None or dispatch.STATE not in ("auto", "cpp", "explain")):
        _outside(NAME, weak)
    try:
        loss = W2S_CONFIDENCE_LOSS(z, weak, *settings, transforms.wants_grad(z)).loss
    except RuntimeError:  # the C++ kernel looks at the labels while it reads them
        if z.device.type == "cpu":
            _outside(NAME, weak)
        raise
    return loss
