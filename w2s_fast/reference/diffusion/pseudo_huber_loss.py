"""Pseudo-Huber distance of whole samples, or the mean of the entries' distances."""

from __future__ import annotations

from torch import Tensor

from ..numerics import accumulate_dtype


def _loss(residual: Tensor, c: float, vector: bool) -> tuple[Tensor, Tensor]:
    square = residual.square()
    if vector:
        square = square.sum(1)
    root = (square + c * c).sqrt()
    loss = square / (root + c)
    return (loss, 1 / root) if vector else (loss.sum(1) / residual.shape[1], loss.new_empty(0))


def _gradient(grad: Tensor, residual: Tensor, inverse: Tensor, c: float) -> Tensor:
    """In the residual ``[B, D]``; the form is told by whether there are roots."""
    if inverse.numel():
        return residual * (grad * inverse).unsqueeze(1)
    return residual / (residual.square() + c * c).sqrt() * (grad / residual.shape[1]).unsqueeze(1)


def pseudo_huber_loss(pred: Tensor, target: Tensor, c: float, vector: bool) -> tuple[Tensor, Tensor]:
    """loss ``[B]`` and, for the vector form, ``1 / sqrt(s + c^2)`` ``[B]`` (else ``[0]``) of pred, target ``[B, D]``.

    vector: ``s / (sqrt(s + c^2) + c)`` with s the sum of squared residuals; otherwise the mean over entries of the same
    with s the entry's square. float32, float64 if either is.
    """
    acc = accumulate_dtype(pred, target)
    return _loss(pred.to(acc) - target.to(acc), c, vector)


def pseudo_huber_backward(grad: Tensor, pred: Tensor, target: Tensor, inverse: Tensor, c: float) -> Tensor:
    """Gradient in pred ``[B, D]``: ``grad_b r / sqrt(s_b + c^2)``; without inverse ``grad_b / D r / sqrt(r^2 + c^2)``.

    inverse is the second result of `pseudo_huber_loss`.
    """
    acc = accumulate_dtype(pred, target)
    return _gradient(grad, pred.to(acc) - target.to(acc), inverse, c).to(pred.dtype)


def _ict_residual(student: Tensor, teacher: Tensor, x_student: Tensor, x_teacher: Tensor, levels: Tensor) -> Tensor:
    acc = accumulate_dtype(student, teacher, x_student, x_teacher)
    a, b, c, d = levels.to(acc).unsqueeze(2).unbind(1)
    return (a * student.to(acc) + c * x_student.to(acc)) + (b * teacher.to(acc) + d * x_teacher.to(acc))


def ict_loss(
    student: Tensor, teacher: Tensor, x_student: Tensor, x_teacher: Tensor, levels: Tensor, c: float, vector: bool
) -> tuple[Tensor, Tensor]:
    """`pseudo_huber_loss` of ``r = k0 student + k1 teacher + k2 x_student + k3 x_teacher``, k = levels ``[B, 4]``."""
    return _loss(_ict_residual(student, teacher, x_student, x_teacher, levels), c, vector)


def ict_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, x_student: Tensor, x_teacher: Tensor, levels: Tensor,
    inverse: Tensor, c: float, column: int,
) -> Tensor:  # fmt: skip
    """Gradient in tensor number ``column``, in its dtype: its coefficient times the gradient in the residual."""
    tensors = (student, teacher, x_student, x_teacher)
    factor = grad * levels[:, column].to(grad.dtype)
    return _gradient(factor, _ict_residual(*tensors, levels), inverse, c).to(tensors[column].dtype)
