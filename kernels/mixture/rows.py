"""What kernels of the mixture share: ROWS rows of classes a program, BLOCK columns of them at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import exp, next_power

#: Logits of a program at a time; with twice as many, float32 and its addresses do not fit into registers.
ELEMENTS = 512


def tile_of(classes: int) -> dict[str, int]:
    """Rows and columns; a function of the number of classes alone."""
    block = min(next_power(classes), ELEMENTS)
    return {"ROWS": min(ELEMENTS // block, 256), "BLOCK": block}


@triton.jit
def program_rows(rows, ROWS: tl.constexpr):
    """This program's rows, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def load(x, stride, row, cols, inside):
    """[ROWS, BLOCK] in float32, -inf outside."""
    at = row[:, None] * stride + cols[None, :]
    return tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def place(row, live, start, classes, BLOCK: tl.constexpr):
    """Columns from ``start`` on, and which of [ROWS, BLOCK] there are."""
    cols = start + tl.arange(0, BLOCK)
    return cols, live[:, None] & (cols[None, :] < classes)


@triton.jit
def scores(a, b, stride_a, stride_b, share, row, cols, inside):
    """Logits of a, or with b of both mixed by ``share`` [ROWS]; -inf outside."""
    z = load(a, stride_a, row, cols, inside)
    if b is not None:
        g = share[:, None]
        z = tl.where(inside, g * z + (1.0 - g) * load(b, stride_b, row, cols, inside), -float("inf"))
    return z


@triton.jit
def largest(a, b, stride_a, stride_b, share, row, live, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row's scores, 0 in rows that are not there."""
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        top = tl.maximum(top, tl.max(scores(a, b, stride_a, stride_b, share, row, cols, inside), 1))
    return tl.where(live, top, 0.0)


@triton.jit
def exp_sum(a, b, stride_a, stride_b, share, top, row, live, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sum e^(z - top) of each row."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        z = scores(a, b, stride_a, stride_b, share, row, cols, inside)
        total += tl.sum(exp(z - top[:, None]), 1)
    return total
