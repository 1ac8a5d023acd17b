"""Pseudo-Huber distance of whole samples, or the mean of the entries' distances."""

from __future__ import annotations

from torch import Tensor

from ..numerics import accumulate_dtype


def pseudo_huber_loss(pred: Tensor, target: Tensor, c: float, vector: bool) -> tuple[Tensor, Tensor]:
    """loss ``[B]`` and, for the vector form, ``1 / sqrt(s + c^2)`` ``[B]`` (else ``[0]``) of pred, target ``[B, D]``.

    vector: ``s / (sqrt(s + c^2) + c)`` with s the sum of squared residuals; otherwise the mean over entries of the same
    with s the entry's square. float32, float64 if either is.
    """
    acc = accumulate_dtype(pred, target)
    square = (pred.to(acc) - target.to(acc)).square()
    if vector:
        square = square.sum(1)
    root = (square + c * c).sqrt()
    loss = square / (root + c)
    return (loss, 1 / root) if vector else (loss.sum(1) / pred.shape[1], loss.new_empty(0))


def pseudo_huber_backward(grad: Tensor, pred: Tensor, target: Tensor, inverse: Tensor, c: float) -> Tensor:
    """Gradient in pred ``[B, D]``: ``grad_b r / sqrt(s_b + c^2)``; without inverse ``grad_b / D r / sqrt(r^2 + c^2)``.

    inverse is the second result of `pseudo_huber_loss`.
    """
    acc = accumulate_dtype(pred, target)
    residual = pred.to(acc) - target.to(acc)
    if inverse.numel():
        return (residual * (grad * inverse).unsqueeze(1)).to(pred.dtype)
    return (residual / (residual.square() + c * c).sqrt() * (grad / pred.shape[1]).unsqueeze(1)).to(pred.dtype)
