"""gated_mixed_ce: the sum of f (g CE(a, y) + (1 - g) CE(b, y)), or of f CE(g a + (1 - g) b, y), over the rows.

With z = a, b or the mixture and dz = f (softmax(z) - 1_y) the gradients are da = g dz, db = (1 - g) dz and
dg = f (CE(a, y) - CE(b, y)), or sum_c dz_c (a_c - b_c).

One program some rows; blocks of their columns are read two or three times, from memory once.
Floor: a and b read once, a tensor written for each gradient.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, exp, launch
from .rows import exp_sum, largest, load, place, program_rows, scores, tile_of


@triton.jit
def _labels(target, gate, ignored, row, live):
    """Class of each row (0 where it does not count), whether it counts, and its gate."""
    y = tl.load(target + row, mask=live, other=ignored)
    keep = y != ignored
    return tl.where(keep, y, 0), keep, tl.load(gate + row, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _own(a, b, stride_a, stride_b, share, row, y, keep):
    """Score of each row's own class, 0 where it does not count."""
    z = tl.load(a + row * stride_a + y, mask=keep, other=0.0).to(tl.float32)
    if b is not None:
        z = share * z + (1.0 - share) * tl.load(b + row * stride_b + y, mask=keep, other=0.0).to(tl.float32)
    return z


@triton.jit
def _statistics(a, b, stride_a, stride_b, share, row, live, y, keep, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row: cross-entropy, largest score, sum e^(z - largest)."""
    top = largest(a, b, stride_a, stride_b, share, row, live, classes, ROWS, BLOCK)
    total = exp_sum(a, b, stride_a, stride_b, share, top, row, live, classes, ROWS, BLOCK)
    return (top - _own(a, b, stride_a, stride_b, share, row, y, keep)) + tl.log(total), top, total


@triton.jit
def _store_gradient(
    a, b, stride_a, stride_b, share, top, total, scale_a, scale_b, row, live, y, keep, classes, o_a, o_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax - 1_y times ``scale_a`` to ``o_a`` and times ``scale_b`` to ``o_b``, as far as wanted; 0 without keep."""
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        p = exp(scores(a, b, stride_a, stride_b, share, row, cols, inside) - top[:, None]) / total[:, None]
        off = tl.where(cols[None, :] == y[:, None], p - 1.0, p)
        at = row[:, None] * classes + cols[None, :]
        if o_a is not None:
            da = tl.where(keep[:, None], scale_a[:, None] * off, 0.0)
            tl.store(o_a + at, da.to(o_a.dtype.element_ty), mask=inside)
        if o_b is not None:
            db = tl.where(keep[:, None], scale_b[:, None] * off, 0.0)
            tl.store(o_b + at, db.to(o_b.dtype.element_ty), mask=inside)


@triton.jit
def _losses_kernel(
    a, b, target, gate, i_factor, stride_a, stride_b, ignored, rows, classes, o_loss, o_gate, o_a, o_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live = program_rows(rows, ROWS)
    y, keep, g = _labels(target, gate, ignored, row, live)
    factor = tl.load(i_factor).to(tl.float32)
    first, top, total = _statistics(a, None, stride_a, 0, None, row, live, y, keep, classes, ROWS, BLOCK)
    if o_a is not None:
        _store_gradient(a, None, stride_a, 0, None, top, total, factor * g, None, row, live, y, keep, classes, o_a,
                        None, ROWS, BLOCK)  # fmt: skip
    second, top, total = _statistics(b, None, stride_b, 0, None, row, live, y, keep, classes, ROWS, BLOCK)
    if o_b is not None:
        _store_gradient(b, None, stride_b, 0, None, top, total, None, factor * (1.0 - g), row, live, y, keep, classes,
                        None, o_b, ROWS, BLOCK)  # fmt: skip
    tl.store(o_loss + row, tl.where(keep, factor * (g * first + (1.0 - g) * second), 0.0), mask=live)
    tl.store(o_gate + row, tl.where(keep, factor * (first - second), 0.0), mask=live)


@triton.jit
def _logits_kernel(
    a, b, target, gate, i_factor, stride_a, stride_b, ignored, rows, classes, o_loss, o_gate, o_a, o_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live = program_rows(rows, ROWS)
    y, keep, g = _labels(target, gate, ignored, row, live)
    factor = tl.load(i_factor).to(tl.float32)
    loss, top, total = _statistics(a, b, stride_a, stride_b, g, row, live, y, keep, classes, ROWS, BLOCK)
    moved = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes, BLOCK):
        cols, inside = place(row, live, start, classes, BLOCK)
        e = exp(scores(a, b, stride_a, stride_b, g, row, cols, inside) - top[:, None])
        apart = load(a, stride_a, row, cols, inside) - load(b, stride_b, row, cols, inside)
        moved += tl.sum(tl.where(e == 0.0, 0.0, e * apart), 1)
    own = _own(a, None, stride_a, 0, None, row, y, keep) - _own(b, None, stride_b, 0, None, row, y, keep)
    if o_a is not None or o_b is not None:
        _store_gradient(a, b, stride_a, stride_b, g, top, total, factor * g, factor * (1.0 - g), row, live, y, keep,
                        classes, o_a, o_b, ROWS, BLOCK)  # fmt: skip
    tl.store(o_loss + row, tl.where(keep, factor * loss, 0.0), mask=live)
    tl.store(o_gate + row, tl.where(keep, factor * (moved / total - own), 0.0), mask=live)


def launch_gated_mixed_ce(
    a: Any, b: Any, target: Any, gate: Any, factor: Any, ignore_index: int, logits: bool, need_a: bool, need_b: bool
) -> tuple[Any, ...]:
    """Arguments of `gated_mixed_ce` -> (loss, da, db, dgate)."""
    rows, classes = a.shape
    losses, dgate = (a.new_empty((rows,), dtype=dtype(a, "float32")) for _ in range(2))
    da, db = a.new_empty(a.shape if need_a else (0,)), b.new_empty(b.shape if need_b else (0,))
    tile = tile_of(classes)
    launch(_logits_kernel if logits else _losses_kernel, cdiv(rows, tile["ROWS"]), a, a, b, target, gate, factor,
           a.stride(0), b.stride(0), ignore_index, rows, classes, losses, dgate, da if need_a else None,
           db if need_b else None, **tile)  # fmt: skip
    return losses.sum(), da, db, dgate


def aot_cases() -> list[AotCase]:
    """Two classes, a graph's, and more than a tile's; mixed losses and mixed logits, with gradients and without."""

    def case(name: str, classes: int, kind: str, logits: bool, wanted: bool = True) -> AotCase:
        def call() -> None:
            a, b, gate = Meta((4096, classes), kind), Meta((4096, classes), kind), Meta((4096,), "float32")
            target, factor = Meta((4096,), "int64"), Meta((), "float32")
            launch_gated_mixed_ce(a, b, target, gate, factor, -100, logits, wanted, wanted)

        return AotCase(name, call)

    return [case("fp32-C2", 2, "float32", False), case("fp32-C40", 40, "float32", False),
            case("fp32-C40-logits", 40, "float32", True), case("fp32-C40-forward", 40, "float32", False, False),
            case("bf16-C2000", 2000, "bfloat16", False)]  # fmt: skip
