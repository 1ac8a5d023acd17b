"""y = gain * (x W^T + scale x' A^T B^T) + bias and its gradients. Sums are float32 (float64 if any operand is)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LoraLinear(NamedTuple):
    """y ``[N, O]``; z ``[N, O]``, what the gain multiplies, in the dtype of x, and h = A x'^T ``[r, N]`` in that of the
    sums; ``[0]`` unless needed."""

    y: Tensor
    z: Tensor
    h: Tensor


class LoraLinearGradients(NamedTuple):
    """Each like its argument, ``[0]`` where not needed."""

    dx: Tensor
    ddropped: Tensor
    dweight: Tensor
    dA: Tensor
    dB: Tensor
    dgain: Tensor


def wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, otherwise float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def lora_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: float,
    need_z: bool,
    need_h: bool,
) -> LoraLinear:
    """x and dropped (x', x where there is none) ``[N, I]``, weight ``[O, I]``, A ``[r, I]``, B ``[O, r]``, bias and
    gain ``[O]``; y in the dtype of x."""
    dtype = wide(x, dropped, weight, A, B)
    none = x.new_empty(0)
    h = A.to(dtype) @ (x if dropped is None else dropped).to(dtype).t()
    z = x.to(dtype) @ weight.to(dtype).t() + scale * (h.t() @ B.to(dtype).t())
    y = z if gain is None else z * gain.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return LoraLinear(y.to(x.dtype), z.to(x.dtype) if need_z else none, h if need_h else none.to(dtype))


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    gain: Tensor | None,
    scale: float,
    z: Tensor,
    h: Tensor,
    need_x: bool,
    need_dropped: bool,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_gain: bool,
) -> LoraLinearGradients:
    """With g = gain * grad and t = g B: dx = g W, dx' = scale t A (a part of dx where there is no x'), dW = g^T x,
    dA = scale t^T x', dB = scale g^T h^T and dgain = sum of grad * z over the rows.

    g is rounded to the dtype of grad, as the products of a library take it. z and h: those of the forward.
    """
    dtype = wide(x, dropped, weight, A, B)
    w, a, b, u = (t.to(dtype) for t in (weight, A, B, grad))
    low = (x if dropped is None else dropped).to(dtype)
    g = u if gain is None else (u * gain.to(dtype)).to(grad.dtype).to(dtype)
    t = g @ b if need_x or need_dropped or need_A else None
    none = x.new_empty(0)

    def like(value: Tensor | None, of: Tensor | None) -> Tensor:
        return none if value is None or of is None else value.to(of.dtype)

    through = None if t is None else scale * (t @ a)
    dx = g @ w if need_x else None
    if dx is not None and dropped is None and through is not None:
        dx = dx + through
    return LoraLinearGradients(
        like(dx, x),
        like(through if need_dropped else None, dropped),
        like(g.t() @ x.to(dtype) if need_weight else None, weight),
        like(scale * (t.t() @ low) if need_A and t is not None else None, A),
        like(scale * (g.t() @ h.to(dtype).t()) if need_B else None, B),
        like((u * z.to(dtype)).sum(0) if need_gain else None, gain),
    )
