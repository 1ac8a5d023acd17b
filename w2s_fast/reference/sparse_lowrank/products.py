"""The two products with a sparse matrix: x S^T (or x S), and the entries of g^T x at the support."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear import wide
from .support import dense, gathered


def spmm(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    plan: Sequence[Tensor],
    rows: int,
    columns: int,
    block: int,
    per_block: int,
    transpose: bool,
) -> Tensor:
    """x S^T [N, O], or x S [N, I] with ``transpose``, in the dtype of x."""
    dtype = wide(x, values)
    sparse = dense(values.to(dtype), row_ptr, cols, rows, columns, block, per_block)
    return (x.to(dtype) @ (sparse if transpose else sparse.t())).to(x.dtype)


def sddmm(
    g: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    plan: Sequence[Tensor],
    rows: int,
    columns: int,
    block: int,
    per_block: int,
) -> Tensor:
    """v_k = sum_n g[n, row_k] x[n, col_k] [K], in the wider dtype of g and x."""
    dtype = wide(g, x)
    product = g.to(dtype).t() @ x.to(dtype)
    return gathered(product, row_ptr, cols, rows, columns, block, per_block).to(torch.promote_types(g.dtype, x.dtype))

