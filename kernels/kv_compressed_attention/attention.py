"""Device helpers of the attention kernels: a head of D columns as two tiles, A and B, whose widths are powers of two.

D = 72 is 64 + 16 (1.11 times the exact work, where the next power of two would be 1.78 times); 64, 128, 256 have no B.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import exp, next_power


def split(head: int) -> tuple[int, int]:
    """Widths of the tiles A and B (0: none) that cover ``head`` columns."""
    whole = max(16, next_power(head))
    first = whole // 2
    if head <= 16 or first < 16:
        return whole, 0
    rest = max(16, next_power(head - first))
    return (whole, 0) if first + rest >= whole else (first, rest)


@triton.jit
def load_tile(base, rows, row_mask, stride, start, D: tl.constexpr, WIDTH: tl.constexpr, DOT_F32: tl.constexpr):
    """Columns [start, start + WIDTH) of rows, [rows, WIDTH]; 0 outside."""
    cols = start + tl.arange(0, WIDTH)
    x = tl.load(base + rows[:, None] * stride + cols[None, :], mask=row_mask[:, None] & (cols[None, :] < D), other=0.0)
    return x.to(tl.float32) if DOT_F32 else x


@triton.jit
def store_tile(base, rows, row_mask, stride, start, D: tl.constexpr, x, WIDTH: tl.constexpr):
    """[rows, WIDTH] to columns [start, start + WIDTH)."""
    cols = start + tl.arange(0, WIDTH)
    mask = row_mask[:, None] & (cols[None, :] < D)
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def power(x, FOLD: tl.constexpr):
    """e^x, or 2^x of what is in log2 units."""
    return tl.exp2(x) if FOLD else exp(x)


@triton.jit
def product(a, b, c, DOT_F32: tl.constexpr):
    """c + a b; operands as loaded, float32 sums without TF32."""
    if DOT_F32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


def interpreted(like: Any) -> bool:
    """Whether the interpreter runs: its dot takes float32 only."""
    return bool(getattr(like, "device", None) is not None and like.device.type == "cpu")


def alignment(*tensors: Any) -> int:
    """8 if every stride of [B, tokens, H, D] tensors is a multiple of 8 and every address of 16 bytes, otherwise 1."""
    fine = all(t.data_ptr() % 16 == 0 and all(t.stride(i) % 8 == 0 for i in range(3)) for t in tensors)
    return 8 if fine else 1


def outer(t: Any) -> tuple[Any, ...]:
    """(tensor, batch stride, token stride, head stride) of [B, tokens, H, D]."""
    return (t, t.stride(0), t.stride(1), t.stride(2))
