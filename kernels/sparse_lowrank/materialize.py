"""W = s B A + S, or a panel of it, in one pass: the values are added to a tile of the product before it is stored.

One program: BLOCK_O rows by a tile of columns; r / BLOCK_K products, then one compare-and-add a value of the fullest
row (support.py). Floor: 2 r O I FLOPs, W written once. The official form writes W, reads it back to scatter and rounds
twice. Also the other direction, `gather`: the entries of a dense panel at the support's positions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch, refuse_double
from .support import Place, dot_type, large_tiles, meta_support, place, scale_of, span, tile_columns


@triton.jit
def _materialize_kernel(
    A,
    a_stride,
    B,
    b_stride,
    rank,
    scale,
    scale_value,
    values,
    support,
    out,
    out_stride,
    row0,
    row1,
    tile0,
    column0,
    tiles,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    pid = tl.program_id(0)
    o = row0 + (pid // tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < row1
    tile = tile0 + pid % tiles
    col, col_mask, origin = tile_columns(support, tile, BLOCK, SUBS, BLOCK_I)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, rank, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < rank
        b = tl.load(
            B + o.to(tl.int64)[:, None] * b_stride + k[None, :], mask=o_mask[:, None] & k_mask[None, :], other=0.0
        )
        a = tl.load(
            A + k.to(tl.int64)[:, None] * a_stride + col[None, :], mask=k_mask[:, None] & col_mask[None, :], other=0.0
        )
        acc = tl.dot(b.to(DOT), a.to(DOT), acc, input_precision="ieee")
    acc *= scale_of(scale, scale_value)
    first, count, most = span(support, o, o_mask, tile, BLOCK, PER_BLOCK, SUBS)
    c = tl.arange(0, BLOCK_I)
    at = tl.load(support[0] + first, mask=count > 0, other=0).to(tl.int32) - origin
    v = tl.load(values + first, mask=count > 0, other=0.0).to(tl.float32)
    for q in range(most):
        at = tl.where(q < count, at, -1)
        more = q + 1 < count  # the next value is on its way while this one is placed
        later = tl.load(support[0] + first + q + 1, mask=more, other=0).to(tl.int32) - origin
        w = tl.load(values + first + q + 1, mask=more, other=0.0).to(tl.float32)
        acc += tl.where(at[:, None] == c[None, :], v[:, None], 0.0)
        at, v = later, w
    tl.store(
        out + (o - row0).to(tl.int64)[:, None] * out_stride + (col - column0)[None, :],
        acc.to(out.dtype.element_ty),
        mask=o_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def _gather_kernel(
    dense,
    stride,
    support,
    out,
    tile0,
    tile1,
    column0,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = o < support[2]
    line = dense + o.to(tl.int64)[:, None] * stride - column0
    if BLOCK == 0:
        at = support[1] + o.to(tl.int64) * (support[4] + 1)
        first = tl.load(at + tile0, mask=mask, other=0)
        count = tl.load(at + tile1, mask=mask, other=0) - first
        for start in range(0, tl.max(count, 0), BLOCK_K):
            q = start + tl.arange(0, BLOCK_K)
            here = q[None, :] < count[:, None]
            col = tl.load(support[0] + first[:, None] + q[None, :], mask=here, other=0).to(tl.int32)
            found = tl.load(line + col, mask=here, other=0.0)
            tl.store(out + first[:, None] + q[None, :], found.to(tl.float32).to(out.dtype.element_ty), mask=here)
    else:
        for wide in range(tile0 // SUBS, tile1 // SUBS):
            first, count, most = span(support, o, mask, wide * SUBS, BLOCK, PER_BLOCK, SUBS)
            for start in range(0, most, BLOCK_K):
                q = start + tl.arange(0, BLOCK_K)
                here = q[None, :] < count[:, None]
                col = wide * BLOCK + tl.load(support[0] + first[:, None] + q[None, :], mask=here, other=0).to(tl.int32)
                found = tl.load(line + col, mask=here, other=0.0)
                tl.store(out + first[:, None] + q[None, :], found.to(tl.float32).to(out.dtype.element_ty), mask=here)


def config(low: bool) -> dict[str, Any]:
    """Tiles of `_materialize_kernel`; BLOCK_I is the support's."""
    return {"BLOCK_O": 128 if low else 64, "BLOCK_K": 64 if low else 32, "num_warps": 8 if low else 4}


def materialize_into(
    A: Any, B: Any, values: Any, scale: Any, where: Place, out: Any, like: Any,
    rows: tuple[int, int] | None = None, tiles: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    """``out`` = W of a range of rows and of tiles of columns (default all); products in the dtype of ``like``.

    ``scale`` is (a tensor of one element or None, a number).
    """
    row0, row1 = rows or (0, where.rows)
    tile0, tile1 = tiles or (0, where.tiles)
    options = config(large_tiles(like))
    launch(
        _materialize_kernel, cdiv(row1 - row0, options["BLOCK_O"]) * (tile1 - tile0), A, A, A.stride(0), B, B.stride(0),
        A.shape[0], *scale, values, where.tensors, out, out.stride(0), row0, row1, tile0, where.first_column(tile0),
        tile1 - tile0, DOT=dot_type(like), **where.options, **options,
    )  # fmt: skip
    return out


def gather(dense: Any, where: Place, tiles: tuple[int, int], out: Any) -> None:
    """Write the values whose columns are in a range of tiles (whole blocks) from the dense panel of these columns."""
    options = {name: where.options[name] for name in ("BLOCK", "PER_BLOCK", "SUBS")}
    launch(
        _gather_kernel, cdiv(where.rows, 32), dense, dense, dense.stride(0), where.tensors, out, *tiles,
        where.first_column(tiles[0]), BLOCK_R=32, BLOCK_K=8 if options["BLOCK"] else 32, **options,
    )  # fmt: skip


def launch_sparse_lowrank_materialize(
    A: Any, B: Any, values: Any, scale: Any, scale_value: float, support: Any, out_dtype: Any
) -> Any:
    """Arguments of `sparse_lowrank_materialize` -> W."""
    out = B.new_empty((support.rows, support.columns), dtype=out_dtype)
    like = B if A.dtype == B.dtype else B.float()
    return materialize_into(A, B, values, (scale, scale_value), place(like, support), out, like)


def supports_sparse_lowrank_materialize(
    A: Any, B: Any, values: Any, scale: Any, scale_value: float, support: Any, out_dtype: Any
) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if str(out_dtype).endswith("float64"):
        return "float64 is served by the reference; the Triton kernels accumulate in float32"
    return refuse_double(A, B, values)


def aot_cases() -> list[AotCase]:
    """W of a 7B layer in both layouts, of a 1B layer in float32; a gather from a panel."""

    def case(kind: str, rows: int, columns: int, rank: int, density: float, block: int) -> None:
        support, nnz = meta_support(rows, columns, density, block)
        A, B, values = Meta((rank, columns), kind), Meta((rows, rank), kind), Meta((nnz,), kind)
        launch_sparse_lowrank_materialize(A, B, values, None, 0.5, support, kind)
        where = place(A, support)
        gather(Meta((rows, where.first_column(16)), kind), where, (0, 16), values)

    return [
        AotCase("bf16-csr-11008x4096", lambda: case("bfloat16", 11008, 4096, 1024, 0.05, 0)),
        AotCase("bf16-balanced-11008x4096", lambda: case("bfloat16", 11008, 4096, 1024, 0.05, 128)),
        AotCase("bf16-csr-5461x2048", lambda: case("bfloat16", 5461, 2048, 512, 0.03, 0)),
        AotCase("fp32-balanced-5461x2048", lambda: case("float32", 5461, 2048, 512, 0.03, 128)),
    ]
