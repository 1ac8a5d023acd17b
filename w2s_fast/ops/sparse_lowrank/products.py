"""spmm and sddmm: the two products with a sparse matrix of fixed support that training needs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.sparse_lowrank import products as reference
from ...reference.sparse_lowrank.arguments import Support
from ..layout import unit_stride
from .support import SparseSupport, _check_values


def _spmm_fake(x: Tensor, values: Tensor, support: Support, transpose: bool) -> Tensor:
    return x.new_empty((x.shape[0], support.columns if transpose else support.rows))


def _spmm_backward(call: Call, grad: Tensor) -> dict[str, Any]:
    x, values, support, transpose = call.x, call.values, call.support, call.transpose
    grad = unit_stride(grad)
    found: dict[str, Any] = {}
    if call.needs.x:
        found["x"] = SPMM.on(call.backend)(grad, values, support, not transpose)
    if call.needs.values:
        # in the dtype of the values, so that wide values keep their digits
        g = grad.to(torch.promote_types(grad.dtype, values.dtype))
        rows, columns = (x, g) if transpose else (g, x)
        found["values"] = SDDMM.on(call.backend)(rows, columns, support).to(values.dtype)
    return found


def _sddmm_fake(g: Tensor, x: Tensor, support: Support) -> Tensor:
    return x.new_empty(support.cols.shape, dtype=torch.promote_types(g.dtype, x.dtype))


def _sddmm_backward(call: Call, grad: Tensor) -> dict[str, Any]:
    g, x, support, grad = call.g, call.x, call.support, grad.contiguous()
    spmm = SPMM.on(call.backend)
    wide = torch.promote_types(g.dtype, x.dtype)  # a product comes in the dtype of its first operand
    return {
        "g": spmm(x.to(wide), grad, support, False).to(g.dtype) if call.needs.g else None,
        "x": spmm(g.to(wide), grad, support, True).to(x.dtype) if call.needs.x else None,
    }


SPMM = define(
    reference.spmm,
    fake=_spmm_fake,
    backward=_spmm_backward,
    saves="x values row_ptr cols plan",
    twice=True,
    triton=Kernel(rowwise="x"),
)
SDDMM = define(
    reference.sddmm,
    fake=_sddmm_fake,
    backward=_sddmm_backward,
    saves="g x row_ptr cols plan",
    twice=True,
    triton=Kernel(rowwise="g x"),
)


def _matrix(op: str, name: str, value: Any, support: Any, width: str) -> Tensor:
    """``value`` [..., width] as a matrix with contiguous rows."""
    if not isinstance(support, SparseSupport):
        checks.fail(op, "support", "a SparseSupport", type(support).__name__, error=TypeError)
    tensor = checks.is_float_tensor(op, name, value)
    size = support.shape[0] if width == "rows" else support.shape[1]
    if tensor.ndim < 1 or tensor.shape[-1] != size:
        checks.fail(op, name, f"of shape [..., {size}], the support's {width}", tuple(tensor.shape))
    checks.same_device(op, [(name, tensor), ("support", support.row_ptr)])
    return unit_stride(tensor.reshape(math.prod(tensor.shape[:-1]), size))


def spmm(x: Tensor, values: Tensor, support: SparseSupport, *, transpose: bool = False) -> Tensor:
    """Product with a sparse matrix of fixed support: ``x S^T``, or ``x S`` with ``transpose``.

    Args:
        x: ``[..., I]`` (``[..., O]`` with ``transpose``); float32, bfloat16, float16 or float64.
        values: ``[K]``, the nonzeros of S [O, I] in the support's order.
        support: `SparseSupport`, layout csr16, csr32 or balanced.
        transpose: multiply by S instead of its transpose.

    Returns:
        ``[..., O]`` (``[..., I]``) in the dtype of x; sums are float32 (float64 if an operand is). Differentiable in x
        and values. Deterministic. SLTrain's (arXiv 2406.02214) sparse part, forward and backward.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> support = w2s_fast.SparseSupport.from_flat(torch.tensor([1, 5]), (2, 3))
        >>> w2s_fast.spmm(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 20.0]), support)
        tensor([[20., 60.]])
    """
    x, values = autocast.linear(x, values)
    rows = _matrix("spmm", "x", x, support, "rows" if transpose else "columns")
    checks.is_float_tensor("spmm", "values", values)
    _check_values("spmm", support, values)
    checks.same_device("spmm", [("x", x), ("values", values)])
    y: Tensor = SPMM(rows, values.contiguous(), support.arguments("spmm"), bool(transpose))
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def sddmm(g: Tensor, x: Tensor, support: SparseSupport) -> Tensor:
    """The entries of ``g^T x`` at a support's positions: ``v_k = sum_n g[n, row_k] x[n, col_k]``.

    The gradient of a sparse weight's values; the dense O x I product is never formed.

    Args:
        g: ``[..., O]``; float32, bfloat16, float16 or float64.
        x: ``[..., I]`` with the leading shape of g.
        support: `SparseSupport` of shape (O, I), layout csr16, csr32 or balanced.

    Returns:
        ``[K]`` in the wider dtype of g and x; sums are float32 (float64). Differentiable in g and x. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> support = w2s_fast.SparseSupport.from_flat(torch.tensor([1, 5]), (2, 3))
        >>> w2s_fast.sddmm(torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0, 3.0]]), support)
        tensor([ 2., 30.])
    """
    g, x = autocast.linear(g, x)
    left, right = _matrix("sddmm", "g", g, support, "rows"), _matrix("sddmm", "x", x, support, "columns")
    if g.shape[:-1] != x.shape[:-1]:
        checks.fail("sddmm", "x", f"of leading shape {[*g.shape[:-1]]}, as g", tuple(x.shape))
    v: Tensor = SDDMM(left, right, support.arguments("sddmm"))
    return v
