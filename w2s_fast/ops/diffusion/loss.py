"""Losses of improved consistency training (iCT): Pseudo-Huber on whole samples, and the pair of denoised outputs."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ... import checks
from .schedule import SIGMA_DATA, SIGMA_MIN, consistency_scalings

Form = Literal["vector", "elementwise"]
Reduction = Literal["mean", "sum", "none"]


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
    _same_samples(op, "target", target, "pred", pred)
    checks.choice(op, "form", form, ("vector", "elementwise"))
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    c = _scale(op, c, pred)
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    if weight is not None:
        _per_sample(op, "weight", weight, pred)
        wide = torch.promote_types(weight.dtype, wide)
    residual = pred.to(wide) - (target if target_grad else target.detach()).to(wide)
    square = residual.square().flatten(1) if residual.ndim > 1 else residual.square().unsqueeze(1)
    if form == "vector":
        square = square.sum(1)
    loss = square / ((square + c * c).sqrt() + c)
    if form == "elementwise":
        loss = loss.sum(1) / square.shape[1]
    if weight is not None:
        loss = loss * weight.to(wide)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.numel(), 1)


def ict_loss(
    student_out: Tensor,
    teacher_out: Tensor,
    x_student: Tensor,
    x_teacher: Tensor,
    sigma_s: Tensor,
    sigma_t: Tensor,
    weight: Tensor | None = None,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_data: float = SIGMA_DATA,
    c: float | None = None,
    form: Form = "vector",
    reduction: Reduction = "mean",
) -> Tensor:
    """Consistency loss from what the network returned at two noise levels (iCT, arXiv 2310.14189).

    ``f(x, s) = c_skip(s) x + c_out(s) F``, see `w2s_fast.ops.diffusion.schedule.consistency_scalings`; the loss is
    `pseudo_huber_loss` of ``f(x_student, sigma_s)`` against ``f(x_teacher, sigma_t)``, which gets no gradient. The
    student sits at the higher level: ``sigma_s = sigma_{i+1}``, ``sigma_t = sigma_i``.

    Args:
        student_out, teacher_out: ``(B, ...)``, the network's F at the two levels, same weights and dropout mask.
        x_student, x_teacher: ``(B, ...)``, its noisy inputs before the scaling by c_in, see `noise_pair`.
        sigma_s, sigma_t: ``(B)``, ``sigma_s > sigma_t >= sigma_min``.
        weight: ``(B)``; default the paper's ``1 / (sigma_s - sigma_t)``.
        sigma_min, sigma_data: of the scalings.
        c, form, reduction: see `pseudo_huber_loss`.

    Returns:
        As `pseudo_huber_loss`; differentiable in student_out (and in x_student, where that needs a gradient).

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, low, high = torch.ones(1, 4), torch.tensor([0.002]), torch.tensor([0.5])
        >>> loss = w2s_fast.ict_loss(torch.zeros(1, 4), torch.zeros(1, 4), x, x, high, low)
        >>> round(loss.item(), 4)
        1.9978
    """
    op = "ict_loss"
    checks.is_float_tensor(op, "student_out", student_out)
    for name, value in (("teacher_out", teacher_out), ("x_student", x_student), ("x_teacher", x_teacher)):
        _same_samples(op, name, value, "student_out", student_out)
    for name, value in (("sigma_s", sigma_s), ("sigma_t", sigma_t)):
        _per_sample(op, name, value, student_out)

    def consistency(x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(x.dtype, out.dtype), torch.float32)
        scalings = consistency_scalings(sigma.to(wide), sigma_min=sigma_min, sigma_data=sigma_data)
        shape = (-1,) + (1,) * (x.ndim - 1)
        f: Tensor = scalings.skip.reshape(shape) * x.to(wide) + scalings.out.reshape(shape) * out.to(wide)
        return f

    if weight is None:
        weight = 1 / (sigma_s - sigma_t)
    with torch.no_grad():
        target = consistency(x_teacher, teacher_out, sigma_t)
    student = consistency(x_student, student_out, sigma_s)
    return pseudo_huber_loss(student, target, weight, c=c, form=form, reduction=reduction)


def noise_pair(x: Tensor, z: Tensor, sigma_t: Tensor | float, sigma_s: Tensor | float) -> tuple[Tensor, Tensor]:
    """The same noise at two levels, ``(x + sigma_t z, x + sigma_s z)``: inputs of a consistency model's two passes.

    Args:
        x, z: ``(B, ...)`` data and noise of one shape.
        sigma_t, sigma_s: numbers or ``(B)``: the teacher's (lower) and the student's level.

    Returns:
        Two tensors like x, computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.noise_pair(torch.zeros(1, 2), torch.ones(1, 2), 0.5, torch.tensor([2.0]))
        (tensor([[0.5000, 0.5000]]), tensor([[2., 2.]]))
    """
    op = "noise_pair"
    _same_samples(op, "z", z, "x", x)
    wide = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    base, noise = x.to(wide), z.to(wide)

    def at(name: str, sigma: Tensor | float) -> Tensor:
        if isinstance(sigma, Tensor):
            _per_sample(op, name, sigma, x)
            level = sigma.to(wide).reshape((-1,) + (1,) * (x.ndim - 1))
            return torch.addcmul(base, noise, level).to(x.dtype)
        return torch.add(base, noise, alpha=checks.number(op, name, sigma, low=0.0)).to(x.dtype)

    return at("sigma_t", sigma_t), at("sigma_s", sigma_s)


def _same_samples(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Both floating point, ``(B, ...)`` of one shape on one device."""
    checks.is_float_tensor(op, like_name, like)
    checks.is_float_tensor(op, name, value)
    if like.ndim < 1:
        checks.fail(op, like_name, "of shape (B, ...)", tuple(like.shape))
    if value.shape != like.shape:
        checks.fail(op, name, f"of the shape of {like_name}, {tuple(like.shape)}", tuple(value.shape))
    checks.same_device(op, [(like_name, like), (name, value)])


def _per_sample(op: str, name: str, value: Tensor, like: Tensor) -> None:
    checks.is_float_tensor(op, name, value)
    if value.shape != like.shape[:1]:
        checks.fail(op, name, f"of shape ({like.shape[0]},), one number a sample", tuple(value.shape))
    checks.same_device(op, [("pred", like), (name, value)])


def _scale(op: str, c: float | None, pred: Tensor) -> float:
    entries = math.prod(pred.shape[1:])
    if entries == 0:
        checks.fail(op, "pred", "of at least one entry a sample", tuple(pred.shape))
    if c is None:
        return 0.00054 * math.sqrt(entries)
    return checks.number(op, "c", c, low=0.0, open_low=True)
