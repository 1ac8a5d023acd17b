"""y = x W^T + bias with W = s B A + S, its gradients, and W itself. Sums are float32 (float64 if any operand is)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Support
from .support import dense, gathered


def wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, otherwise float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _factor(scale: Tensor | None, scale_value: float, dtype: torch.dtype) -> Tensor | float:
    return scale_value if scale is None else scale.to(dtype)


class LowRankLinear(NamedTuple):
    """y ``[N, O]`` and h = x A^T ``[N, r]``, ``[0]`` unless needed."""

    y: Tensor
    h: Tensor


def sparse_lowrank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    bias: Tensor | None,
    support: Support,
    materialize: bool,
    need_h: bool,
) -> LowRankLinear:
    """y [N, O] in the dtype of x, and h = x A^T [N, r] (accumulation dtype; [0] unless asked for)."""
    dtype = wide(x, A, B, values)
    xw, s = x.to(dtype), _factor(scale, scale_value, dtype)
    sparse = dense(values.to(dtype), support)
    h = xw.new_empty(0)
    if materialize:
        y = xw @ (B.to(dtype) @ A.to(dtype) * s + sparse).t()
    else:
        h = xw @ A.to(dtype).t()
        y = h @ B.to(dtype).t() * s + xw @ sparse.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return LowRankLinear(y.to(x.dtype), h if need_h else xw.new_empty(0))


class LowRankGradients(NamedTuple):
    """Each like its argument, ``[0]`` where not needed."""

    dx: Tensor
    dA: Tensor
    dB: Tensor
    dvalues: Tensor
    dscale: Tensor


def sparse_lowrank_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    h: Tensor | None,
    support: Support,
    materialize: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_values: bool,
    need_scale: bool,
) -> LowRankGradients:
    """dx, dA, dB, dvalues (dtypes of their tensors) and dscale; those not asked for have shape [0].

    With g the gradient of y and t = g B: dx = s t A + g S, dA = s t^T x, dB = s g^T h, dv_k = sum_n g[n, row_k]
    x[n, col_k], ds = sum h o t. With ``materialize`` the same through W and dW = g^T x: dx = g W, dA = s B^T dW,
    dB = s dW A^T, dv = dW at the support, ds = sum B o dW A^T.
    """
    dtype = wide(x, A, B, values)
    g, xw, a, b = (t.to(dtype) for t in (grad, x, A, B))
    s = _factor(scale, scale_value, dtype)
    sparse = dense(values.to(dtype), support)
    dw = g.t() @ xw if need_values or materialize else None
    if materialize:
        assert dw is not None
        dx, da, db = g @ (b @ a * s + sparse), b.t() @ dw * s, dw @ a.t()
        ds = (b * db).sum()
    else:
        h = xw @ a.t() if h is None else h.to(dtype)
        t = g @ b
        dx, da, db = t * s @ a + g @ sparse, t.t() @ xw * s, g.t() @ h
        ds = (h * t).sum()
    found = (dx, da, db * s, None if dw is None else gathered(dw, support), ds)
    tensors, need = (x, A, B, values, x if scale is None else scale), (need_x, need_A, need_B, need_values, need_scale)
    dx, da, db, dv, ds = (
        value.to(like.dtype).reshape(like.shape) if wanted and value is not None else like.new_empty(0)
        for value, like, wanted in zip(found, tensors, need, strict=True)
    )
    return LowRankGradients(dx, da, db, dv, ds)


def sparse_lowrank_materialize(
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    support: Support,
    out_dtype: torch.dtype,
) -> Tensor:
    """W = s B A + S [O, I], rounded once."""
    dtype = wide(A, B, values)
    sparse = dense(values.to(dtype), support)
    return (B.to(dtype) @ A.to(dtype) * _factor(scale, scale_value, dtype) + sparse).to(out_dtype)
