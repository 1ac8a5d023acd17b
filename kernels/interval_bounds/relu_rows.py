"""relu_rows on a GPU: rows [M, B, N] through the two lines of a ReLU over boxes [B, N], and the gradient.

Forward: a program owns one row of one sample and walks over its columns, 8 bytes an entry. Gradient: a program owns a
block of one sample's columns and walks over the rows, so that the box's gradient is summed in order; 12 bytes an entry.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch


@triton.jit
def _least(a, b):
    """The smaller, or what is not a number."""
    return tl.where(a <= b, a, tl.where(a != a, a, b))


@triton.jit
def _ends(lower, upper):
    """left and top of a box, and whether top is upper's; see `reference.relu_rows.lines`."""
    left, right = _least(lower, 0.0), -_least(-upper, 0.0)
    least = left + 1e-8
    top = tl.where(right > least, right, tl.where(right != right, right, least))
    return left, top, right > least


@triton.jit
def _lines(left, top):
    """slope, low and intercept."""
    slope = top / (top - left)
    return slope, tl.where(top > -left, 1.0, 0.0), -left * slope


@triton.jit
def _rows_kernel(i_a, i_l, i_u, o_a, o_t, batch, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < columns
        lower = tl.load(i_l + sample * columns + at, mask=mask, other=0.0).to(tl.float32)
        upper = tl.load(i_u + sample * columns + at, mask=mask, other=0.0).to(tl.float32)
        left, top, _apart = _ends(lower, upper)
        slope, low, intercept = _lines(left, top)
        a = tl.load(i_a + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(a <= 0.0, 0.0, a) * intercept
        out = a * tl.where(a > 0.0, slope, low)
        tl.store(o_a + row * columns + at, out.to(o_a.dtype.element_ty), mask=mask)
    tl.store(o_t + row, tl.sum(total, 0))


@triton.jit
def _gradient_kernel(
    i_g, i_m, i_a, i_l, i_u, o_a, o_l, o_u, rows, batch, columns,
    NEED_A: tl.constexpr, NEED_BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(columns, BLOCK)
    sample = (pid // blocks).to(tl.int64)
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    box = sample * columns + at
    lower = tl.load(i_l + box, mask=mask, other=0.0).to(tl.float32)
    upper = tl.load(i_u + box, mask=mask, other=0.0).to(tl.float32)
    left, top, apart = _ends(lower, upper)
    slope, low, intercept = _lines(left, top)
    of_slope = tl.zeros((BLOCK,), tl.float32)
    of_intercept = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rows):
        row = tl.cast(i, tl.int64) * batch + sample
        a = tl.load(i_a + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(i_g + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        more = tl.load(i_m + row)
        if NEED_BOX:
            up = tl.where(a <= 0.0, 0.0, a)
            of_slope += up * g
            of_intercept += up * more
        if NEED_A:
            da = tl.where(a > 0.0, g * slope + more * intercept, g * low)
            tl.store(o_a + row * columns + at, da.to(o_a.dtype.element_ty), mask=mask)
    if NEED_BOX:
        width = top - left
        to_top = (of_intercept * left - of_slope) * left / (width * width)
        to_left = (of_slope - of_intercept * left) * slope / width - of_intercept * slope
        dl = tl.where(lower > 0.0, 0.0, tl.where(apart, to_left, to_left + to_top))
        du = tl.where(apart & (upper >= 0.0), to_top, 0.0)
        tl.store(o_l + box, dl.to(o_l.dtype.element_ty), mask=mask)
        tl.store(o_u + box, du.to(o_u.dtype.element_ty), mask=mask)


BLOCK = 1024


def launch_relu_rows(a: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """Arguments of `relu_rows` -> (rows, total)."""
    rows, batch, columns = a.shape
    out, total = a.new_empty((rows, batch, columns)), a.new_empty((rows, batch), dtype=dtype(a, "float32"))
    launch(_rows_kernel, rows * batch, a, a, lower, upper, out, total, batch, columns, BLOCK=BLOCK)
    return out, total


def launch_relu_rows_backward(
    grad: Any, more: Any, a: Any, lower: Any, upper: Any, need_a: bool, need_box: bool
) -> tuple[Any, Any, Any]:
    """Arguments of `relu_rows_backward` -> (da, dlower, dupper), of shape [0] where not wanted."""
    rows, batch, columns = a.shape
    da = a.new_empty((rows, batch, columns) if need_a else (0,))
    dl, du = (a.new_empty((batch, columns) if need_box else (0,)) for _ in range(2))
    launch(
        _gradient_kernel, batch * cdiv(columns, BLOCK), a, grad, more, a, lower, upper, da, dl, du, rows, batch,
        columns, NEED_A=need_a, NEED_BOX=need_box, BLOCK=BLOCK,
    )  # fmt: skip
    return da, dl, du


def aot_cases() -> list[AotCase]:
    """Nine rows of a convolutional layer of CNN7 in float32, of a hidden one in bfloat16."""

    def case(kind: str, rows: int, batch: int, columns: int) -> None:
        a, box, more = Meta((rows, batch, columns), kind), Meta((batch, columns), kind), Meta((rows, batch), "float32")
        launch_relu_rows(a, box, box)
        launch_relu_rows_backward(a, more, a, box, box, True, True)

    return [
        AotCase("fp32-m9-b128-n65536", lambda: case("float32", 9, 128, 65536)),
        AotCase("bf16-m9-b128-n512", lambda: case("bfloat16", 9, 128, 512)),
    ]
