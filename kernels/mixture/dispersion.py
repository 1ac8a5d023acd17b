"""dispersion: of a row's d = z - max with S = sum e^d, Q = sum e^{2 d}, X = sum d e^d

    (Q / S^2 - 1 / C) / (1 - 1 / C)  and  1 - (log S - X / S) / log C,

and their gradient ``p (k (e^d - Q / S) / S + l (d - X / S))``, p = e^d / S, k = 2 g0 / (1 - 1 / C), l = g1 / log C.

One program some rows; blocks of their columns are read twice, three times for a gradient, from memory once.
Floor: the logits read once; the gradient reads them again and writes one.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, exp, launch
from .rows import largest, load, place, program_rows, tile_of


@triton.jit
def _moments(x, stride, top, row, live, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """S, Q / S and X / S of each row."""
    total = tl.zeros((ROWS,), tl.float32)
    square, product = total, total
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        d = load(x, stride, row, cols, inside) - top[:, None]
        e = exp(d)
        total += tl.sum(e, 1)
        square += tl.sum(e * e, 1)
        product += tl.sum(tl.where(e > 0.0, d * e, 0.0), 1)
    return total, square / total, product / total


@triton.jit
def _dispersion_kernel(x, stride, rows, classes, o_out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, live = program_rows(rows, ROWS)
    top = largest(x, None, stride, 0, None, row, live, classes, ROWS, BLOCK)
    total, square, mean = _moments(x, stride, top, row, live, classes, ROWS, BLOCK)
    even, log_classes = 1.0 / classes, tl.log(tl.cast(classes, tl.float32))  # a uniform row's own, or it gives no 0
    tl.store(o_out + 2 * row, (square / total - even) / (1.0 - even), mask=live)
    tl.store(o_out + 2 * row + 1, 1.0 - (tl.log(total) - mean) / log_classes, mask=live)


@triton.jit
def _dispersion_backward_kernel(
    grad, x, stride, rows, classes, k, log_classes, o_dx, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, live = program_rows(rows, ROWS)
    top = largest(x, None, stride, 0, None, row, live, classes, ROWS, BLOCK)
    total, square, mean = _moments(x, stride, top, row, live, classes, ROWS, BLOCK)
    first = tl.load(grad + 2 * row, mask=live, other=0.0) * k
    second = tl.load(grad + 2 * row + 1, mask=live, other=0.0) / log_classes
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        d = load(x, stride, row, cols, inside) - top[:, None]
        e = exp(d)
        slope = first[:, None] * ((e - square[:, None]) / total[:, None]) + second[:, None] * (d - mean[:, None])
        # 0 where e is, unless the row has a NaN
        dx = tl.where((e == 0.0) & (total == total)[:, None], 0.0, e / total[:, None] * slope)
        tl.store(o_dx + row[:, None] * classes + cols[None, :], dx.to(o_dx.dtype.element_ty), mask=inside)


def launch_dispersion(logits: Any) -> Any:
    """Arguments of `dispersion` -> the result."""
    rows, classes = logits.shape
    out, tile = logits.new_empty((rows, 2), dtype=dtype(logits, "float32")), tile_of(classes)
    launch(_dispersion_kernel, cdiv(rows, tile["ROWS"]), logits, logits, logits.stride(0), rows, classes, out,
           **tile)  # fmt: skip
    return out


def launch_dispersion_backward(grad: Any, logits: Any) -> Any:
    """Arguments of `dispersion_backward` -> dlogits."""
    rows, classes = logits.shape
    dlogits, tile = logits.new_empty(logits.shape), tile_of(classes)
    launch(_dispersion_backward_kernel, cdiv(rows, tile["ROWS"]), logits, grad, logits, logits.stride(0), rows, classes,
           2.0 / (1.0 - 1.0 / classes), math.log(classes), dlogits, **tile)  # fmt: skip
    return dlogits


def aot_cases() -> list[AotCase]:
    """Two classes, a graph's, and more than a tile's."""

    def case(name: str, classes: int, kind: str) -> AotCase:
        def both() -> None:
            logits = Meta((4096, classes), kind)
            launch_dispersion(logits)
            launch_dispersion_backward(Meta((4096, 2), "float32"), logits)

        return AotCase(name, both)

    return [case("fp32-C2", 2, "float32"), case("fp32-C40", 40, "float32"), case("bf16-C2000", 2000, "bfloat16")]
