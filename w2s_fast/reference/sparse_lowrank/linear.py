"""y = x W^T + bias with W = s B A + S, its gradients, and W itself. Sums are float32 (float64 if any operand is)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .support import dense, gathered


def wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, otherwise float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _factor(scale: Tensor | None, scale_value: float, dtype: torch.dtype) -> Tensor | float:
    return scale_value if scale is None else scale.to(dtype)


def sparse_lowrank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    plan: Sequence[Tensor],
    rows: int,
    columns: int,
    block: int,
    per_block: int,
    materialize: bool,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """y [N, O] in the dtype of x, and h = x A^T [N, r] (accumulation dtype; [0] unless asked for)."""
    dtype = wide(x, A, B, values)
    xw, s = x.to(dtype), _factor(scale, scale_value, dtype)
    sparse = dense(values.to(dtype), row_ptr, cols, rows, columns, block, per_block)
    h = xw.new_empty(0)
    if materialize:
        y = xw @ (B.to(dtype) @ A.to(dtype) * s + sparse).t()
    else:
        h = xw @ A.to(dtype).t()
        y = h @ B.to(dtype).t() * s + xw @ sparse.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype), h if need_h else xw.new_empty(0)


def sparse_lowrank_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    h: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    plan: Sequence[Tensor],
    rows: int,
    columns: int,
    block: int,
    per_block: int,
    materialize: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_values: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dvalues (dtypes of their tensors) and dscale; those not asked for have shape [0].

    With g the gradient of y and t = s g B: dx = t A + g S, dA = t^T x, dB = s g^T h, dv_k = sum_n g[n, row_k]
    x[n, col_k], ds = sum h o (g B).
    """
    dtype = wide(x, A, B, values)
    g, xw, a, b = (t.to(dtype) for t in (grad, x, A, B))
    s = _factor(scale, scale_value, dtype)
    h = xw @ a.t() if h is None else h.to(dtype)
    through = g @ b
    none = g.new_empty(0)
    support = (row_ptr, cols, rows, columns, block, per_block)
    dx = (through * s @ a + g @ dense(values.to(dtype), *support)).to(x.dtype) if need_x else x.new_empty(0)
    da = ((through * s).t() @ xw).to(A.dtype) if need_A else A.new_empty(0)
    db = (g.t() @ h * s).to(B.dtype) if need_B else B.new_empty(0)
    dv = gathered(g.t() @ xw, *support).to(values.dtype) if need_values else values.new_empty(0)
    ds = none if scale is None or not need_scale else (h * through).sum().to(scale.dtype).reshape(scale.shape)
    return dx, da, db, dv, ds


def sparse_lowrank_materialize(
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor | None,
    scale_value: float,
    row_ptr: Tensor,
    cols: Tensor,
    plan: Sequence[Tensor],
    rows: int,
    columns: int,
    block: int,
    per_block: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """W = s B A + S [O, I], rounded once."""
    dtype = wide(A, B, values)
    sparse = dense(values.to(dtype), row_ptr, cols, rows, columns, block, per_block)
    return (B.to(dtype) @ A.to(dtype) * _factor(scale, scale_value, dtype) + sparse).to(out_dtype)
