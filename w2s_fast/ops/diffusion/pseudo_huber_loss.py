"""pseudo_huber_loss: quadratic near zero, linear far away; one read of the residuals' tensors, one more in backward."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.diffusion import pseudo_huber_loss as reference
from ...reference.numerics import accumulate_dtype
from ...transforms import wants_grad
from ..numbers import number

Form = Literal["vector", "elementwise"]
Reduction = Literal["mean", "sum", "none"]


def _fake(pred: Tensor, target: Tensor, c: float, vector: bool) -> tuple[Tensor, Tensor]:
    acc, rows = accumulate_dtype(pred, target), pred.shape[0]
    return pred.new_empty(rows, dtype=acc), pred.new_empty(rows if vector else 0, dtype=acc)


PSEUDO_HUBER_BACKWARD = define(
    reference.pseudo_huber_backward,
    fake=lambda grad, pred, *_: pred.new_empty(pred.shape),
    triton=Kernel(),
)


def _backward(call: Call, grads: reference.Huber) -> dict[str, Any]:
    pred, target, needs = call.pred, call.target, call.needs
    # the gradient comes in the first tensor's dtype: the wider goes first where both want one
    swap = needs.target and (not needs.pred or target.dtype.itemsize > pred.dtype.itemsize)
    first, second = (target, pred) if swap else (pred, target)
    found = PSEUDO_HUBER_BACKWARD.on(call.backend)(grads.loss.contiguous(), first, second, call.out.inverse, call.c)
    other = (-found).to(second.dtype) if needs.pred and needs.target else None
    return {"pred": other, "target": found} if swap else {"pred": found, "target": other}


PSEUDO_HUBER_LOSS = define(
    reference.pseudo_huber_loss,
    fake=_fake,
    backward=_backward,
    saves="pred target inverse",
    carriers="loss",
    triton=Kernel(),
)


def plain_huber(residual: Tensor, weight: Tensor | None, c: float | None, reduction: str) -> Tensor:
    """The vector form of residuals ``(B, ...)`` as one writes it in PyTorch, with its digits."""
    flat = residual if residual.ndim == 2 else residual.flatten(1)
    scale = 0.00054 * math.sqrt(flat.shape[1]) if c is None else float(c)
    square, dtype = (flat * flat).sum(1), flat.dtype
    loss = square / ((square + number(scale * scale, dtype)).sqrt() + number(scale, dtype))
    loss = loss if weight is None else loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() * number(1 / loss.shape[0], loss.dtype)


def _plain(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, c: float | None = None, reduction: Reduction = "mean"
) -> Any:
    if pred.ndim < 2 or not pred.numel():
        return NotImplemented
    target = target.detach() if target.requires_grad else target
    if pred.dtype is torch.float32 is target.dtype:
        return plain_huber(pred - target, weight, c, reduction)
    acc = accumulate_dtype(pred, target)
    return plain_huber(as_wide(pred, acc) - as_wide(target, acc), weight, c, reduction)


def as_wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``."""
    return t if t.dtype is dtype else t.to(dtype)


@or_plain(_plain)
def pseudo_huber_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    c: float | None = None,
    form: Form = "vector",
    reduction: Reduction = "mean",
    target_grad: bool = False,
) -> Tensor:
    """Pseudo-Huber distance of each sample: quadratic below c, linear above (iCT, arXiv 2310.14189).

    ``vector``: ``l_b = weight_b (sqrt(sum_i r_bi^2 + c^2) - c)``, the paper's, on whole samples. ``elementwise``:
    ``l_b = weight_b mean_i (sqrt(r_bi^2 + c^2) - c)``, another loss that several reimplementations use. Both are
    computed as ``s / (sqrt(s + c^2) + c)``, which keeps its digits where s is far below c^2.

    Args:
        pred, target: ``(B, ...)`` of one shape, d entries a sample; float32, bfloat16, float16 or float64.
        weight: ``(B)`` or None for 1.
        c: > 0; default ``0.00054 sqrt(d)``.
        form: ``"vector"`` or ``"elementwise"``.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.
        target_grad: whether ``target`` gets a gradient; in consistency training it is a teacher and does not.

    Returns:
        float32 (float64 if any input is), a scalar or ``(B)`` with ``reduction="none"``; the mean of an empty batch
        is 0. Differentiable in pred and weight.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> round(w2s_fast.pseudo_huber_loss(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=12.0).item(), 6)
        1.0
    """
    op = "pseudo_huber_loss"
    same_samples(op, "target", target, "pred", pred)
    checks.choice(op, "form", form, ("vector", "elementwise"))
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    c = default_scale(op, "pred", c, pred)
    if weight is not None:
        per_sample(op, "weight", weight, pred)
    if not target_grad and wants_grad(target):
        target = target.detach()
    rows = as_rows(pred), as_rows(target)
    loss: Tensor = PSEUDO_HUBER_LOSS(*rows, c, form == "vector").loss
    return reduced(loss, weight, reduction)


def reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weighted losses ``(B)``, their sum or their mean; the mean of none is 0."""
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" and loss.numel() else loss.sum()


def as_rows(t: Tensor) -> Tensor:
    """``(B, ...)`` as ``(B, D)``."""
    if t.ndim == 2:
        return t
    return t.reshape(t.shape[0], -1) if t.numel() else t.reshape(0, 1)


def same_samples(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Both floating point, ``(B, ...)`` of one shape on one device."""
    checks.is_float_tensor(op, like_name, like)
    checks.is_float_tensor(op, name, value)
    if like.ndim < 1:
        checks.fail(op, like_name, "of shape (B, ...)", tuple(like.shape))
    if value.shape != like.shape:
        checks.fail(op, name, f"of the shape of {like_name}, {tuple(like.shape)}", tuple(value.shape))
    checks.same_device(op, [(like_name, like), (name, value)])


def per_sample(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """Floating point, one number a sample of ``like``."""
    checks.is_float_tensor(op, name, value)
    if value.shape != like.shape[:1]:
        checks.fail(op, name, f"of shape ({like.shape[0]},), one number a sample", tuple(value.shape))
    checks.same_device(op, [("pred", like), (name, value)])


def default_scale(op: str, name: str, c: float | None, like: Tensor) -> float:
    """c, by default ``0.00054 sqrt(d)``."""
    entries = math.prod(like.shape[1:])
    if entries == 0:
        checks.fail(op, name, "of at least one entry a sample", tuple(like.shape))
    if c is None:
        return 0.00054 * math.sqrt(entries)
    return checks.number(op, "c", c, low=0.0, open_low=True)
