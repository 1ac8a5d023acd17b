"""x S^T and x S, each with an optional low-rank part and bias, and the entries of g^T x at the support.

    y = x S^T + s h B^T + bias      [N, O], h = x A^T        one program: BLOCK_N rows by BLOCK_O columns of y
    dx = g S + s t A                [N, I], t = g B          one program: BLOCK_N rows by a tile of columns
    v_k = sum_n g[n, row_k] x[n, col_k]                      one program: BLOCK_O rows by a tile of columns of g^T x

The output is written once: the low-rank product comes first in the same accumulator. For v, the tile of g^T x stays in
registers and one masked reduction a value leaves it; if there are few tiles, the rows are split and the partial sums
added in order. Up to 8 rows are a memory-bound gather instead (few.py).

Floor of y: 2 r (I + O) + (2 + index) K bytes, 2 N (O I + r O) FLOPs on the tensor cores (S counts as dense there), and
2 Q / BLOCK_N of that again in compares, Q the fullest row's values in a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch
from .few import FEW, few_rows
from .support import (
    Place,
    dot_type,
    large_tiles,
    meta_support,
    place,
    scale_of,
    single,
    span,
    sparse_tile,
    tile_columns,
)


@triton.jit
def _spmm_kernel(
    x,
    x_stride,
    values,
    support,
    low,
    scale,
    scale_value,
    bias,
    out,
    count,
    blocks,
    TRANSPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    rows, columns = support[2], support[3]
    pid = tl.program_id(0)
    unit = pid // blocks  # blocks of x that multiply the same part of S are next to each other
    n = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < count
    if TRANSPOSE:
        col, col_mask, _ = tile_columns(support, unit, BLOCK, SUBS, BLOCK_I)
        width = columns
        acc = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    else:
        col = unit * BLOCK_O + tl.arange(0, BLOCK_O)
        col_mask = col < rows
        width = rows
        acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    if len(low) > 0:
        acc = _low_rank(low, n, n_mask, col, col_mask, acc, TRANSPOSE, BLOCK_K, DOT) * scale_of(scale, scale_value)
    if TRANSPOSE:
        for start in range(0, rows, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            g = tl.load(x + n[:, None] * x_stride + o[None, :], mask=n_mask[:, None] & (o < rows)[None, :], other=0.0)
            s = sparse_tile(
                support, values, o, o < rows, unit, BLOCK, PER_BLOCK, SUBS, BLOCK_O, BLOCK_I, False, DOT
            )  # [BLOCK_O, BLOCK_I]
            acc = tl.dot(g.to(DOT), s, acc, input_precision="ieee")
    else:
        for tile in range(support[4]):
            c, c_mask, _ = tile_columns(support, tile, BLOCK, SUBS, BLOCK_I)
            part = tl.load(x + n[:, None] * x_stride + c[None, :], mask=n_mask[:, None] & c_mask[None, :], other=0.0)
            s = sparse_tile(
                support, values, col, col_mask, tile, BLOCK, PER_BLOCK, SUBS, BLOCK_O, BLOCK_I, True, DOT
            )  # [BLOCK_I, BLOCK_O]
            acc = tl.dot(part.to(DOT), s, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + n[:, None] * width + col[None, :],
        acc.to(out.dtype.element_ty),
        mask=n_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def _low_rank(
    low, n, n_mask, col, col_mask, acc, TRANSPOSE: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):
    """h P with P = B^T, or A with TRANSPOSE; low is (h, its stride, B or A, its stride, rank)."""
    for start in range(0, low[4], BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < low[4]
        h = tl.load(low[0] + n[:, None] * low[1] + k[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0.0)
        if TRANSPOSE:
            at = low[2] + k.to(tl.int64)[:, None] * low[3] + col[None, :]
        else:
            at = low[2] + col.to(tl.int64)[None, :] * low[3] + k[:, None]
        p = tl.load(at, mask=k_mask[:, None] & col_mask[None, :], other=0.0)  # [BLOCK_K, columns of the output]
        acc = tl.dot(h.to(DOT), p.to(DOT), acc, input_precision="ieee")
    return acc


@triton.jit
def _sddmm_kernel(
    g,
    g_stride,
    x,
    x_stride,
    support,
    out,
    nnz,
    count,
    splits,
    part,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DOT: tl.constexpr,
):
    pid = tl.program_id(0)
    split = (pid % splits).to(tl.int64)
    unit = pid // splits
    tile = unit % support[4]
    o = (unit // support[4]) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < support[2]
    col, col_mask, origin = tile_columns(support, tile, BLOCK, SUBS, BLOCK_I)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, part, BLOCK_N):
        n = split * part + start + tl.arange(0, BLOCK_N)
        n_mask = (start + tl.arange(0, BLOCK_N) < part) & (n < count)
        left = tl.load(g + n[:, None] * g_stride + o[None, :], mask=n_mask[:, None] & o_mask[None, :], other=0.0)
        right = tl.load(x + n[:, None] * x_stride + col[None, :], mask=n_mask[:, None] & col_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(left.to(DOT)), right.to(DOT), acc, input_precision="ieee")
    first, number_of, most = span(support, o, o_mask, tile, BLOCK, PER_BLOCK, SUBS)
    c = tl.arange(0, BLOCK_I)
    for q in range(most):
        here = q < number_of
        at = tl.load(support[0] + first + q, mask=here, other=0).to(tl.int32) - origin
        v = tl.sum(tl.where(at[:, None] == c[None, :], acc, 0.0), 1)
        mine = here & (at >= 0) & (at < BLOCK_I)  # not another tile of the same block
        tl.store(out + split * nnz + first + q, v.to(out.dtype.element_ty), mask=mine)


def config(count: int, low: bool, transpose: bool) -> dict[str, Any]:
    """Tiles of `_spmm_kernel`: short blocks for few rows, a quarter of the area for float32 (no tensor cores)."""
    block = 16 if count <= 16 else 32 if count <= 32 else 64 if count <= 64 or not low else 128
    deep = 64 if low else 32
    if transpose:
        return {"BLOCK_N": block, "BLOCK_O": deep, "BLOCK_K": deep, "num_warps": 8 if low else 4}
    return {"BLOCK_N": block, "BLOCK_O": 2 * deep, "BLOCK_K": deep, "num_warps": 8 if block >= 64 else 4}


def spmm_into(
    x: Any, values: Any, where: Place, transpose: bool, low: tuple[Any, ...], scale: tuple[Any, float], bias: Any,
    out: Any,
) -> Any:  # fmt: skip
    """``out`` = x S^T (x S with ``transpose``) + scale times the low-rank part + bias.

    ``low``: see `_low_rank`, () without that part; ``scale``: a tensor of one element or None, and the number instead.
    """
    dot, count = dot_type(x), x.shape[0]
    options = config(count, large_tiles(x), transpose)
    units = where.tiles if transpose else cdiv(where.rows, options["BLOCK_O"])
    blocks = cdiv(count, options["BLOCK_N"])
    launch(
        _spmm_kernel, blocks * units, x, x, x.stride(0), values, where.tensors, low, *scale, bias, out, count,
        blocks,
        TRANSPOSE=transpose, DOT=dot, **where.options, **options,
    )  # fmt: skip
    return out


#: Programs that fill a GPU several times over; fewer and the rows are split, but no finer than so many rows.
_PROGRAMS, _SPLIT_ROWS = 512, 1024


def _partial_sums(g: Any, x: Any, where: Place, nnz: int, out_dtype: Any) -> Any:
    """v of each part of the rows [parts, K]; in ``out_dtype`` if there is one part, otherwise float32."""
    low, count = large_tiles(x), x.shape[0]
    options = {"BLOCK_N": 64 if low else 32, "BLOCK_O": 128 if low else 64, "num_warps": 8 if low else 4}
    units = where.tiles * cdiv(where.rows, options["BLOCK_O"])
    splits = max(1, min(cdiv(_PROGRAMS, max(units, 1)), cdiv(count, _SPLIT_ROWS), 16))
    part = cdiv(cdiv(count, splits), options["BLOCK_N"]) * options["BLOCK_N"]
    out = x.new_empty((splits, nnz), dtype=out_dtype if splits == 1 else single(x))
    launch(
        _sddmm_kernel, units * splits, x, g, g.stride(0), x, x.stride(0), where.tensors, out, nnz, count, splits, part,
        DOT=dot_type(x), **where.options, **options,
    )  # fmt: skip
    return out


def sddmm_into(g: Any, x: Any, where: Place, nnz: int, out_dtype: Any) -> Any:
    """v [K] in ``out_dtype``; g and x of one dtype."""
    parts = _partial_sums(g, x, where, nnz, out_dtype)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(out_dtype)


def launch_spmm(x: Any, values: Any, support: Any, transpose: bool) -> Any:
    """Arguments of `spmm` -> y."""
    out = x.new_empty((x.shape[0], support.columns if transpose else support.rows))
    if x.shape[0] <= FEW and not transpose:
        return few_rows(x, values, support, (), (None, 1.0), None, out)
    return spmm_into(x, values, place(x, support), transpose, (), (None, 1.0), None, out)


def launch_sddmm(g: Any, x: Any, support: Any) -> Any:
    """Arguments of `sddmm` -> values, in the wider dtype of g and x."""
    wide = x if x.dtype == g.dtype or "float32" in str(x.dtype) else g.float()
    g, x = g.to(wide.dtype), x.to(wide.dtype)
    return sddmm_into(g, x, place(x, support), support.cols.shape[0], wide.dtype)


def aot_cases() -> list[AotCase]:
    """A 7B layer in bf16, csr16 and balanced, both ways, with and without the low-rank part; a 1B layer in fp32."""

    def case(kind: str, count: int, rows: int, columns: int, rank: int, density: float, block: int) -> None:
        support, nnz = meta_support(rows, columns, density, block)
        x, g, values = Meta((count, columns), kind), Meta((count, rows), kind), Meta((nnz,), kind)
        h, A, B = Meta((count, rank), kind), Meta((rank, columns), kind), Meta((rows, rank), kind)
        where = place(x, support)
        spmm_into(x, values, where, False, (h, rank, B, rank, rank), (None, 0.5), Meta((rows,), kind), g)
        spmm_into(g, values, where, True, (h, rank, A, columns, rank), (Meta((1,), "float32"), 1.0), None, x)
        _partial_sums(g, x, where, nnz, kind)

    def alone() -> None:
        support, nnz = meta_support(4096, 4096, 0.05)
        x = Meta((64, 4096), "bfloat16")
        launch_spmm(x, Meta((nnz,), "bfloat16"), support, False)
        launch_spmm(x, Meta((nnz,), "bfloat16"), support, True)

    big, small = (11008, 4096, 1024, 0.05), (5461, 2048, 512, 0.03)
    return [
        AotCase("bf16-csr-11008x4096-n512", lambda: case("bfloat16", 512, *big, 0)),
        AotCase("bf16-balanced-11008x4096-n512", lambda: case("bfloat16", 512, *big, 128)),
        AotCase("bf16-csr-11008x4096-n16", lambda: case("bfloat16", 16, *big, 0)),
        AotCase("bf16-csr-11008x4096-n32", lambda: case("bfloat16", 32, *big, 0)),
        AotCase("bf16-balanced256-5461x2048-n16384", lambda: case("bfloat16", 16384, *small, 256)),
        AotCase("fp16-csr-5461x2048-n16384", lambda: case("float16", 16384, *small, 0)),
        AotCase("fp32-csr-5461x2048-n512", lambda: case("float32", 512, *small, 0)),
        AotCase("fp32-balanced-5461x2048-n16", lambda: case("float32", 16, *small, 128)),
        AotCase("bf16-spmm-csr-4096x4096-n64", alone),
    ]
