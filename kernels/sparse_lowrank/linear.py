"""y = x (s B A + S)^T + bias on a GPU, three ways.

Few rows (N <= 8): few.py, each weight read once. Factored: h = x A^T by the library's product, rounded to the dtype of
x, then products.py adds s h B^T, x S^T and bias and writes y once. Materialize: panels of rows of W (at most `PANEL`
bytes of scratch) and the library's product, (1 + r / N) of a dense layer's FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..common import AotCase, Meta, cdiv, refuse_double
from .few import FEW, few_rows, project
from .materialize import materialize_into
from .products import spmm_into
from .support import Place, meta_support, place

#: Bytes of a panel of W, or of its gradient: about what stays in the cache between writing and reading it.
PANEL = 32 << 20


def row_panels(where: Place, width: int) -> Iterator[tuple[int, int]]:
    """Even ranges of rows, a multiple of 128, of at most PANEL bytes with ``width`` bytes a value."""
    most = max(128, PANEL // max(where.columns * width, 1) // 128 * 128)
    size = cdiv(cdiv(where.rows, max(cdiv(where.rows, most), 1)), 128) * 128
    for first in range(0, where.rows, max(size, 1)):
        yield first, min(first + size, where.rows)


def _materialized(x: Any, A: Any, B: Any, values: Any, scale: Any, bias: Any, where: Place) -> Any:
    y = x.new_empty((x.shape[0], where.rows))
    if bias is not None:
        y.copy_(bias)
    for first, end in row_panels(where, x.element_size()):
        w = x.new_empty((end - first, where.columns))
        materialize_into(A, B, values, scale, where, w, x, rows=(first, end))
        y[:, first:end].addmm_(x, w.t(), beta=0 if bias is None else 1)
    return y


def _factored(x: Any, h: Any, B: Any, values: Any, scale: Any, bias: Any, support: Any) -> Any:
    rank, out = B.shape[1], x.new_empty((x.shape[0], B.shape[0]))
    low = (h, h.stride(0), B, B.stride(0), rank) if rank else ()
    if x.shape[0] <= FEW:
        return few_rows(x, values, support, low, scale, bias, out)
    return spmm_into(x, values, place(x, support), False, low, scale, bias, out)


def launch_sparse_lowrank_linear(
    x: Any, A: Any, B: Any, values: Any, scale: Any, scale_value: float, bias: Any, support: Any, materialize: bool,
    need_h: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Arguments of `sparse_lowrank_linear` -> (y, h); h is float32."""
    if materialize:
        y = _materialized(x, A, B, values, (scale, scale_value), bias, place(x, support))
        h = x.new_empty((0,))
    else:
        h = project(x, A) if x.shape[0] <= FEW else x @ A.to(x.dtype).t()
        y = _factored(x, h, B, values, (scale, scale_value), bias, support)
    return y, (h if need_h else h.new_empty((0,))).float()


def supports_sparse_lowrank_linear(x: Any, A: Any, B: Any, values: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return refuse_double(x, A, B, values)


def aot_cases() -> list[AotCase]:
    """The 7B layers at the rows of decoding, small batches and training."""

    def case(count: int, rows: int, columns: int, rank: int, density: float) -> None:
        support, nnz = meta_support(rows, columns, density)
        x, A, B = (Meta(s, "bfloat16") for s in ((count, columns), (rank, columns), (rows, rank)))
        h = project(x, A) if count <= FEW else Meta((count, rank), "bfloat16")
        _factored(x, h, B, Meta((nnz,), "bfloat16"), (None, 0.5), None, support)
        where, w = place(x, support), Meta((2048, columns), "bfloat16")
        materialize_into(A, B, Meta((nnz,), "bfloat16"), (None, 0.5), where, w, x, rows=(2048, 4096))

    return [
        AotCase(f"bf16-csr-{rows}x{columns}-n{count}", lambda a=(count, rows, columns, rank, density): case(*a))
        for rows, columns, rank, density in ((4096, 4096, 1024, 0.05), (5461, 2048, 512, 0.03))
        for count in (1, 512, 16384)
    ]
