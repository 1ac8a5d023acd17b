"""ict_loss: the consistency loss from a network's outputs at two noise levels (iCT, arXiv 2310.14189), in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.diffusion import pseudo_huber_loss as reference
from ...reference.diffusion.pseudo_huber_loss import Consistency
from ...reference.numerics import accumulate_dtype
from ..numbers import number
from .pseudo_huber_loss import (
    Form,
    Reduction,
    as_rows,
    as_wide,
    default_scale,
    per_sample,
    plain_huber,
    reduced,
    same_samples,
)
from .schedule import SIGMA_DATA, SIGMA_MIN, skip_and_out


def _fake(given: Consistency, c: float, vector: bool) -> tuple[Tensor, Tensor]:
    student, rows = given.student, given.student.shape[0]
    acc = accumulate_dtype(student, given.teacher, given.x_student, given.x_teacher)
    return student.new_empty(rows, dtype=acc), student.new_empty(rows if vector else 0, dtype=acc)


ICT_BACKWARD = define(
    reference.ict_backward,
    fake=lambda grad, given, inverse, c, column: given[column].new_empty(given[column].shape),
    triton=Kernel(),
)


def _backward(call: Call, grads: reference.Huber) -> dict[str, Any]:
    run, grad = ICT_BACKWARD.on(call.backend), grads.loss.contiguous()
    return {
        name: run(grad, call.given, call.out.inverse, call.c, column)
        for column, name in enumerate(("student", "teacher", "x_student", "x_teacher"))
        if getattr(call.needs.given, name)
    }


ICT_LOSS = define(
    reference.ict_loss,
    fake=_fake,
    backward=_backward,
    saves="student teacher x_student x_teacher levels inverse",
    carriers="loss",
    triton=Kernel(),
)


def _plain(
    student_out: Tensor, teacher_out: Tensor, x_student: Tensor, x_teacher: Tensor, sigma_s: Tensor, sigma_t: Tensor, *,
    c: float | None = None, reduction: Reduction = "mean",
) -> Any:  # fmt: skip
    if student_out.ndim < 2 or not student_out.numel():
        return NotImplemented
    acc = accumulate_dtype(student_out, teacher_out, x_student, x_teacher)
    tensors = [as_wide(t, acc) for t in (student_out, teacher_out.detach(), x_student, x_teacher.detach())]
    student, teacher, noisy, other = tensors
    sigma_s, sigma_t = sigma_s.detach(), sigma_t.detach()
    sigmas = as_wide(torch.stack((sigma_s, sigma_t)), acc)  # both levels at once
    data, above = number(SIGMA_DATA**2, acc), sigmas - number(SIGMA_MIN, acc)
    skip = data / torch.addcmul(data, above, above)
    out = above * number(SIGMA_DATA, acc) * torch.addcmul(data, sigmas, sigmas).rsqrt()
    shape = (2, -1, *[1] * (student.ndim - 1))
    skip, out = skip.view(shape), out.view(shape)
    residual = torch.addcmul(noisy * skip[0], student, out[0]) - torch.addcmul(other * skip[1], teacher, out[1])
    return plain_huber(residual, (sigma_s - sigma_t).reciprocal(), c, reduction)


@or_plain(_plain)
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

    if weight is None:
        weight = 1 / (sigma_s - sigma_t).detach()
    else:
        per_sample(op, "weight", weight, student_out)
    checks.choice(op, "form", form, ("vector", "elementwise"))
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    tensors = (student_out, teacher_out.detach(), x_student, x_teacher.detach())
    acc = accumulate_dtype(*tensors)
    sigmas = torch.stack((sigma_s, sigma_t), 1).detach().to(acc)
    sigma_min = checks.number(op, "sigma_min", sigma_min, low=0.0)
    skip, out = skip_and_out(sigmas, sigma_min, checks.number(op, "sigma_data", sigma_data, low=0.0, open_low=True))
    levels = torch.cat((out, skip), 1)
    levels[:, 1::2].neg_()  # the teacher's
    c = default_scale(op, "student_out", c, student_out)
    student, teacher, noisy, other = (as_rows(t) for t in tensors)
    given = Consistency(student, teacher, noisy, other, levels)
    loss: Tensor = ICT_LOSS(given, c, form == "vector").loss
    return reduced(loss, weight, reduction)
