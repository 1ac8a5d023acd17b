"""Gradients of y = x (s B A + S)^T on a GPU, with g the gradient of y.

dx: factored, g S + s t A in one kernel with t = g B; materialized, g W in panels of columns of W, so that every entry
of dx is one sum. Parameters, whichever costs less: through t and h = x A^T (dA = s t^T x, dB = s g^T h; 4 N r (I + O)
FLOPs) with dv from tiles of g^T x that never leave the registers; or, where there are more rows than O I / (I + O),
from panels of dW = g^T x (dA = s B^T dW, dB = s dW A^T, dv gathered; 4 r O I FLOPs beside dW). No atomics: every sum
has one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch, refuse_double
from .linear import PANEL
from .materialize import gather, materialize_into
from .products import _partial_sums, sddmm_into, spmm_into
from .support import Place, dot_type, large_tiles, meta_support, place, single


@triton.jit
def _product(
    left, left_stride, n, n_mask, right, k_stride, r_stride, r, r_mask, width, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):
    """left right, float32 [rows, r], from left [rows, width] and right [width, r] of any strides."""
    acc = tl.zeros((n.shape[0], r.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < width
        a = tl.load(left + n[:, None] * left_stride + k[None, :], mask=n_mask[:, None] & inside[None, :], other=0.0)
        at = right + k.to(tl.int64)[:, None] * k_stride + r.to(tl.int64)[None, :] * r_stride
        b = tl.load(at, mask=inside[:, None] & r_mask[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee")
    return acc


@triton.jit
def _dscale_kernel(
    g,
    g_stride,
    x,
    x_stride,
    A,
    a_stride,
    B,
    b_stride,
    partial,
    count,
    rows,
    columns,
    rank,
    blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = _product(g, g_stride, n, n < count, B, b_stride, 1, r, r < rank, rows, BLOCK_K, DOT)
    h = _product(x, x_stride, n, n < count, A, 1, a_stride, r, r < rank, columns, BLOCK_K, DOT)
    tl.store(partial + pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(t * h, 1))


def _scale_gradient(g: Any, x: Any, A: Any, B: Any) -> Any:
    """Parts of the sum of (x A^T) o (g B). Neither is rounded: the sum cancels, their roundings would not."""
    low, rank = large_tiles(x), A.shape[0]
    width = 64 if low else 32
    down, across = cdiv(x.shape[0], width), cdiv(rank, width)
    partial = x.new_empty((down * across, width), dtype=single(x))
    launch(
        _dscale_kernel, down * across, x, g, g.stride(0), x, x.stride(0), A, A.stride(0), B, B.stride(0), partial,
        x.shape[0], B.shape[0], A.shape[1], rank, across,
        BLOCK_N=width, BLOCK_R=width, BLOCK_K=width, DOT=dot_type(x),
    )  # fmt: skip
    return partial


def column_panels(where: Place, width: int) -> Iterator[tuple[int, int]]:
    """Even ranges of tiles of columns, whole blocks, of at most `PANEL` bytes with ``width`` bytes a value."""
    subs = where.options["SUBS"]
    column = max(where.first_column(subs), 1)  # columns of a block, or of a csr tile
    wide = where.tiles // subs
    most = max(1, PANEL // max(where.rows * column * width, 1))
    size = cdiv(wide, max(cdiv(wide, most), 1)) * subs
    for first in range(0, where.tiles, max(size, 1)):
        yield first, min(first + size, where.tiles)


def _scaled(product: Any, a: Any, b: Any, scale: Any, scale_value: float, dtype: Any) -> Any:
    """s a b in ``dtype``, into ``product``: a number is applied before the rounding, a tensor after it."""
    if scale is None:
        return product.addmm_(a, b, beta=0, alpha=scale_value).to(dtype)
    return (product.addmm_(a, b, beta=0).float() * scale.float()).to(dtype)


def _input_gradient(g: Any, t: Any, A: Any, B: Any, values: Any, scale: Any, where: Place, materialize: bool) -> Any:
    dx, rank = g.new_empty((g.shape[0], where.columns)), A.shape[0]
    if not materialize:
        low = (t, t.stride(0), A, A.stride(0), rank) if rank else ()
        return spmm_into(g, values, where, True, low, scale, None, dx)
    for tiles in column_panels(where, g.element_size()):
        first, end = (where.first_column(tile) for tile in tiles)
        w = g.new_empty((where.rows, end - first))
        materialize_into(A, B, values, scale, where, w, g, tiles=tiles)
        dx[:, first:end].addmm_(g, w, beta=0)
    return dx


def _from_panels(
    g: Any, x: Any, A: Any, B: Any, values: Any, scale: Any, scale_value: float, where: Place, need: Any
) -> tuple[Any, ...]:
    """dA, dB, dv from panels of columns of dW = g^T x."""
    need_A, need_B, need_values = need
    a, b = A.to(x.dtype), B.to(x.dtype)
    da, dv = x.new_empty(A.shape), values.new_empty(values.shape)
    through = B.float().new_zeros(B.shape)  # dW A^T, summed over the panels
    for tiles in column_panels(where, x.element_size()):
        first, end = (where.first_column(tile) for tile in tiles)
        dw = g.t() @ x[:, first:end]
        if need_A:
            da[:, first:end] = _scaled(x.new_empty((A.shape[0], end - first)), b.t(), dw, scale, scale_value, x.dtype)
        if need_B:
            through += (dw @ a[:, first:end].t()).float()
        if need_values:
            gather(dw, where, tiles, dv)
    s = scale_value if scale is None else scale.float()
    return da.to(A.dtype), (through * s).to(B.dtype), dv


def _through_rank(
    g: Any, x: Any, t: Any, A: Any, B: Any, values: Any, scale: Any, scale_value: float, h: Any, where: Place, need: Any
) -> tuple[Any, ...]:
    """dA, dB, dv through h = x A^T and t = g B."""
    need_A, need_B, need_values = need
    da = db = dv = None
    if need_A:
        da = _scaled(x.new_empty(A.shape), t.t(), x, scale, scale_value, A.dtype)
    if need_B:
        h = x @ A.to(x.dtype).t() if h is None else h.to(x.dtype)
        db = _scaled(x.new_empty(B.shape), g.t(), h, scale, scale_value, B.dtype)
    if need_values:
        dv = sddmm_into(g, x, where, values.shape[0], values.dtype)
    return da, db, dv


def launch_sparse_lowrank_backward(
    grad: Any, x: Any, A: Any, B: Any, values: Any, scale: Any, scale_value: float, h: Any, support: Any,
    materialize: bool, need_x: bool, need_A: bool, need_B: bool, need_values: bool, need_scale: bool,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Arguments of `sparse_lowrank_backward` -> (dx, dA, dB, dvalues, dscale); shape [0] where not asked for."""
    rows, columns, need = support.rows, support.columns, (need_A, need_B, need_values)
    g, where = grad.to(x.dtype), place(x, support)
    panels = materialize and x.shape[0] * (rows + columns) >= rows * columns
    t = g @ B.to(x.dtype) if (need_x and not materialize) or (need_A and not panels) else None
    dx = _input_gradient(g, t, A, B, values, (scale, scale_value), where, materialize) if need_x else x.new_empty((0,))
    if panels:
        found = _from_panels(g, x, A, B, values, scale, scale_value, where, need)
    else:
        found = _through_rank(g, x, t, A, B, values, scale, scale_value, h, where, need)
    wanted = [f if n else like.new_empty((0,)) for f, n, like in zip(found, need, (A, B, values), strict=True)]
    if scale is None or not need_scale:
        return dx, *wanted, grad.new_empty((0,))
    return dx, *wanted, _scale_gradient(g, x, A, B).sum().to(scale.dtype).reshape(scale.shape)


def supports_sparse_lowrank_backward(grad: Any, x: Any, A: Any, B: Any, values: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return refuse_double(grad, x, A, B, values)


def aot_cases() -> list[AotCase]:
    """The kernels of a training step of the 7B layers: dx and dv, factored; a panel of columns."""

    def case(count: int, rows: int, columns: int, rank: int, density: float, block: int) -> None:
        support, nnz = meta_support(rows, columns, density, block)
        x, g, t, A, B, values = (
            Meta(s, "bfloat16")
            for s in ((count, columns), (count, rows), (count, rank), (rank, columns), (rows, rank), (nnz,))
        )
        where = place(x, support)
        _input_gradient(g, t, A, B, values, (None, 0.5), where, False)
        _partial_sums(g, x, where, nnz, "bfloat16")
        _scale_gradient(g, x, A, B)
        panel = (0, where.tiles // 2)
        materialize_into(A, B, values, (None, 0.5), where, Meta((rows, columns // 2), "bfloat16"), g, tiles=panel)
        gather(Meta((rows, columns // 2), "bfloat16"), where, panel, values)

    return [
        AotCase("bf16-csr-11008x4096-n16384", lambda: case(16384, 11008, 4096, 1024, 0.05, 0)),
        AotCase("bf16-balanced-5461x2048-n512", lambda: case(512, 5461, 2048, 512, 0.03, 128)),
    ]
