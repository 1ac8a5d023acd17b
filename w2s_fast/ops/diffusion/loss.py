"""The loss of improved consistency training (iCT, arXiv 2310.14189) from a network's outputs at two noise levels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .pseudo_huber_loss import Form, Reduction, per_sample, pseudo_huber_loss, same_samples
from .schedule import SIGMA_DATA, SIGMA_MIN, consistency_scalings


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
        same_samples(op, name, value, "student_out", student_out)
    for name, value in (("sigma_s", sigma_s), ("sigma_t", sigma_t)):
        per_sample(op, name, value, student_out)

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
    same_samples(op, "z", z, "x", x)
    wide = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    base, noise = x.to(wide), z.to(wide)

    def at(name: str, sigma: Tensor | float) -> Tensor:
        if isinstance(sigma, Tensor):
            per_sample(op, name, sigma, x)
            level = sigma.to(wide).reshape((-1,) + (1,) * (x.ndim - 1))
            return torch.addcmul(base, noise, level).to(x.dtype)
        return torch.add(base, noise, alpha=checks.number(op, name, sigma, low=0.0)).to(x.dtype)

    return at("sigma_t", sigma_t), at("sigma_s", sigma_s)
