"""Up to 8 rows: y = x S^T + s (x A^T) B^T + bias, each weight read once.

Two launches. `_down_kernel`: h = x A^T, a program BLOCK_R rows of A. `_up_kernel`: a program BLOCK_O rows of B and S,
its products with h and the gathered x in one accumulator. Sums are float32, h too. Floor: 2 r (I + O) + (2 + index) K
bytes. csrc/cuda/sparse_lowrank is the same in one launch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch, next_power
from .support import meta_support, scale_of, single

#: Rows up to which a gather beats forming tiles.
FEW = 8


@triton.jit
def _down_kernel(
    x,
    x_stride,
    A,
    a_stride,
    h,
    count,
    columns,
    rank,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < columns
        a = tl.load(A + r[:, None] * a_stride + k[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
        part = tl.load(x + n[:, None] * x_stride + k[None, :], mask=(n < count)[:, None] & inside[None, :], other=0.0)
        acc += part.to(tl.float32)[:, None, :] * a.to(tl.float32)[None, :, :]
    total = tl.sum(acc, 2)  # [BLOCK_N, BLOCK_R]
    tl.store(h + n[:, None] * rank + r[None, :], total, mask=(n < count)[:, None] & (r < rank)[None, :])


@triton.jit
def _place(support, o, j, first, end, BLOCK: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Where the j-th value of each row stands, which exist, and the first column of their block. [BLOCK_O, BLOCK_K]"""
    if BLOCK == 0:
        return first[:, None] + j[None, :], first[:, None] + j[None, :] < end[:, None], 0
    else:
        before = (support[4] - 1) * PER_BLOCK  # values of a row before the last block
        block = tl.minimum(j // PER_BLOCK, support[4] - 1)
        per = tl.where(j < before, PER_BLOCK, support[5])
        at = block * support[2] * PER_BLOCK
        at = at[None, :] + o[:, None] * per[None, :] + (j - block * PER_BLOCK)[None, :]
        inside = (o < support[2])[:, None] & (j < before + support[5])[None, :]
        return at, inside, (block * BLOCK)[None, :]


@triton.jit
def _up_kernel(
    x,
    x_stride,
    values,
    row_ptr,
    support,
    low,
    scale,
    scale_value,
    bias,
    out,
    count,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    o_mask, n_mask = o < support[2], n < count
    acc = tl.zeros((BLOCK_N, BLOCK_O, BLOCK_K), tl.float32)
    if len(low) > 0:
        for start in range(0, low[4], BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < low[4]
            at = low[2] + o.to(tl.int64)[:, None] * low[3] + k[None, :]
            b = tl.load(at, mask=o_mask[:, None] & inside[None, :], other=0.0)
            h = tl.load(low[0] + n[:, None] * low[1] + k[None, :], mask=n_mask[:, None] & inside[None, :], other=0.0)
            acc += h.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :]
        acc *= scale_of(scale, scale_value)
    if BLOCK == 0:
        first = tl.load(row_ptr + o, mask=o_mask, other=0)
        end = tl.load(row_ptr + o + 1, mask=o_mask, other=0)
        most = tl.max(end - first, 0)
    else:
        first, end = o, o
        most = (support[4] - 1) * PER_BLOCK + support[5]
    for start in range(0, most, BLOCK_K):
        at, inside, base = _place(support, o, start + tl.arange(0, BLOCK_K), first, end, BLOCK, PER_BLOCK)
        col = base + tl.load(support[0] + at, mask=inside, other=0).to(tl.int32)
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        source = x + n[:, None, None] * x_stride + col[None, :, :]
        part = tl.load(source, mask=n_mask[:, None, None] & inside[None, :, :], other=0.0)
        acc += part.to(tl.float32) * v[None, :, :]
    total = tl.sum(acc, 2)  # [BLOCK_N, BLOCK_O]
    if bias is not None:
        total += tl.load(bias + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + n[:, None] * support[2] + o[None, :],
        total.to(out.dtype.element_ty),
        mask=n_mask[:, None] & o_mask[None, :],
    )


def project(x: Any, A: Any) -> Any:
    """h = x A^T, float32 [N, r]."""
    h = x.new_empty((x.shape[0], A.shape[0]), dtype=single(x))
    rows = next_power(x.shape[0])
    launch(
        _down_kernel, cdiv(A.shape[0], 2) if x.shape[0] else 0, x, x, x.stride(0), A, A.stride(0), h, x.shape[0],
        x.shape[1], A.shape[0], BLOCK_N=rows, BLOCK_R=2, BLOCK_K=max(256, 1024 // rows),
    )  # fmt: skip
    return h


def few_rows(
    x: Any, values: Any, support: Any, low: tuple[Any, ...], scale: tuple[Any, float], bias: Any, out: Any
) -> Any:
    """``out`` for up to `FEW` rows of x; ``low`` and ``scale`` as in products.py, with h in float32."""
    row_ptr, cols, rows, columns = support.row_ptr, support.cols, support.rows, support.columns
    block, per_block = support.block, support.per_block
    blocks = cdiv(columns, block) if block else 0
    last = (2 * per_block * (columns - (blocks - 1) * block) + block) // (2 * block) if blocks else 0
    launch(
        _up_kernel, cdiv(rows, 4) if x.shape[0] else 0, x, x, x.stride(0), values, row_ptr,
        (cols, None, rows, columns, blocks, last), low, *scale, bias, out, x.shape[0],
        BLOCK=block if blocks else 0, PER_BLOCK=per_block, BLOCK_N=next_power(x.shape[0]), BLOCK_O=4, BLOCK_K=64,
    )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """One and eight rows of a 7B layer, one of a 1B layer in float32."""

    def case(kind: str, count: int, rows: int, columns: int, rank: int, density: float, block: int) -> None:
        support, nnz = meta_support(rows, columns, density, block)
        x, A, B = Meta((count, columns), kind), Meta((rank, columns), kind), Meta((rows, rank), kind)
        h = project(x, A)
        low, bias, out = (h, rank, B, rank, rank), Meta((rows,), kind), Meta((count, rows), kind)
        few_rows(x, Meta((nnz,), kind), support, low, (None, 0.5), bias, out)

    return [
        AotCase("bf16-csr-11008x4096-n1", lambda: case("bfloat16", 1, 11008, 4096, 1024, 0.05, 0)),
        AotCase("bf16-csr-4096x4096-n8", lambda: case("bfloat16", 8, 4096, 4096, 1024, 0.05, 0)),
        AotCase("bf16-balanced-11008x4096-n1", lambda: case("bfloat16", 1, 11008, 4096, 1024, 0.05, 128)),
        AotCase("fp32-csr-5461x2048-n1", lambda: case("float32", 1, 5461, 2048, 512, 0.03, 0)),
    ]
