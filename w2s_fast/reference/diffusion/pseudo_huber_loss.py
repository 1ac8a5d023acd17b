"""Pseudo-Huber distance of whole samples, or the mean of the entries' distances."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..numerics import accumulate_dtype


class Huber(NamedTuple):
    """loss ``[B]`` and inverse ``[B]``, ``[0]`` for the elementwise form."""

    loss: Tensor
    inverse: Tensor


class Consistency(NamedTuple):
    """What the network gave and was given at two levels, ``[B, D]`` each, and the levels' numbers ``[B, 4]``."""

    student: Tensor
    teacher: Tensor
    x_student: Tensor
    x_teacher: Tensor
    levels: Tensor


def _loss(residual: Tensor, c: float, vector: bool) -> Huber:
    square = residual.square()
    if vector:
        square = square.sum(1)
    root = (square + c * c).sqrt()
    loss = square / (root + c)
    return Huber(loss, 1 / root) if vector else Huber(loss.sum(1) / residual.shape[1], loss.new_empty(0))


def _gradient(grad: Tensor, residual: Tensor, inverse: Tensor, c: float) -> Tensor:
    """In the residual ``[B, D]``; the form is told by whether there are roots."""
    if inverse.numel():
        return residual * (grad * inverse).unsqueeze(1)
    return residual / (residual.square() + c * c).sqrt() * (grad / residual.shape[1]).unsqueeze(1)


def pseudo_huber_loss(pred: Tensor, target: Tensor, c: float, vector: bool) -> Huber:
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


def _ict_residual(given: Consistency) -> Tensor:
    student, teacher, x_student, x_teacher, levels = given
    acc = accumulate_dtype(student, teacher, x_student, x_teacher)
    a, b, c, d = levels.to(acc).unsqueeze(2).unbind(1)
    return (a * student.to(acc) + c * x_student.to(acc)) + (b * teacher.to(acc) + d * x_teacher.to(acc))


def ict_loss(given: Consistency, c: float, vector: bool) -> Huber:
    """`pseudo_huber_loss` of ``r = k0 student + k1 teacher + k2 x_student + k3 x_teacher``, k = levels ``[B, 4]``."""
    return _loss(_ict_residual(given), c, vector)


def ict_backward(grad: Tensor, given: Consistency, inverse: Tensor, c: float, column: int) -> Tensor:
    """Gradient in tensor number ``column``, in its dtype: its coefficient times the gradient in the residual."""
    factor = grad * given.levels[:, column].to(grad.dtype)
    return _gradient(factor, _ict_residual(given), inverse, c).to(given[column].dtype)
