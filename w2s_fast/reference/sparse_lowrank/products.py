"""The two products with a sparse matrix: x S^T (or x S), and the entries of g^T x at the support."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Support
from .linear import wide
from .support import dense, gathered


def spmm(x: Tensor, values: Tensor, support: Support, transpose: bool) -> Tensor:
    """x S^T [N, O], or x S [N, I] with ``transpose``, in the dtype of x."""
    dtype = wide(x, values)
    sparse = dense(values.to(dtype), support)
    return (x.to(dtype) @ (sparse if transpose else sparse.t())).to(x.dtype)


def sddmm(g: Tensor, x: Tensor, support: Support) -> Tensor:
    """v_k = sum_n g[n, row_k] x[n, col_k] [K], in the wider dtype of g and x."""
    dtype = wide(g, x)
    product = g.to(dtype).t() @ x.to(dtype)
    return gathered(product, support).to(torch.promote_types(g.dtype, x.dtype))

