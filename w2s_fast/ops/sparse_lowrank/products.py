"""spmm and sddmm: the two products with a sparse matrix of fixed support that training needs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import autocast, checks
from ...library import Kernel, define
from ...reference.sparse_lowrank import products as reference
from .support import SUPPORT, SparseSupport, Support, _check_values, contiguous_rows


def _spmm_fake(x: Tensor, values: Tensor, *args: Any) -> Tensor:
    given, transpose = Support(*args[:-1]), args[-1]
    return x.new_empty((x.shape[0], given.columns if transpose else given.rows))


def _spmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, row_ptr, cols, plan, *ctx.sizes, ctx.transpose = inputs
    ctx.save_for_backward(x, values, row_ptr, cols, *plan)


def _spmm_backward(ctx: Any, grad: Tensor) -> dict[str, Any]:
    x, values, row_ptr, cols, *plan = ctx.saved_tensors
    given, grad = (row_ptr, cols, plan, *ctx.sizes), contiguous_rows(grad)
    dx = dv = None
    if ctx.needs_input_grad[0]:
        dx = SPMM.on(ctx.backend)(grad, values, *given, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        # in the dtype of the values, so that wide values keep their digits
        g = grad.to(torch.promote_types(grad.dtype, values.dtype))
        dv = SDDMM.on(ctx.backend)(*((x, g) if ctx.transpose else (g, x)), *given).to(values.dtype)
    return {"x": dx, "values": dv}


def _sddmm_fake(g: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, *_: Any) -> Tensor:
    return x.new_empty(cols.shape, dtype=torch.promote_types(g.dtype, x.dtype))


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, x, row_ptr, cols, plan, *ctx.sizes = inputs
    ctx.save_for_backward(g, x, row_ptr, cols, *plan)


def _sddmm_backward(ctx: Any, grad: Tensor) -> dict[str, Any]:
    g, x, row_ptr, cols, *plan = ctx.saved_tensors
    given, grad = (row_ptr, cols, plan, *ctx.sizes), grad.contiguous()
    spmm = SPMM.on(ctx.backend)
    wide = torch.promote_types(g.dtype, x.dtype)  # a product comes in the dtype of its first operand
    return {
        "g": spmm(x.to(wide), grad, *given, False).to(g.dtype) if ctx.needs_input_grad[0] else None,
        "x": spmm(g.to(wide), grad, *given, True).to(x.dtype) if ctx.needs_input_grad[1] else None,
    }


SPMM = define(
    "spmm",
    f"(Tensor x, Tensor values, {SUPPORT}, bool transpose) -> Tensor y",
    reference=reference.spmm,
    fake=_spmm_fake,
    setup_context=_spmm_context,
    backward=_spmm_backward,
    twice=True,
    triton=Kernel(
        "kernels.sparse_lowrank.products:launch_spmm",
        "kernels.sparse_lowrank.products:supports_spmm",
        rowwise="x",
    ),
)
SDDMM = define(
    "sddmm",
    f"(Tensor g, Tensor x, {SUPPORT}) -> Tensor values",
    reference=reference.sddmm,
    fake=_sddmm_fake,
    setup_context=_sddmm_context,
    backward=_sddmm_backward,
    twice=True,
    triton=Kernel(
        "kernels.sparse_lowrank.products:launch_sddmm",
        "kernels.sparse_lowrank.products:supports_sddmm",
        rowwise="g x",
    ),
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
    return contiguous_rows(tensor.reshape(math.prod(tensor.shape[:-1]), size))


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
    y: Tensor = SPMM(rows, values.contiguous(), *support.arguments("spmm"), bool(transpose))
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
    v: Tensor = SDDMM(left, right, *support.arguments("sddmm"))
    return v
