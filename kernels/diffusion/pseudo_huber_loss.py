"""pseudo_huber_loss and its gradient, r = pred - target.

    vector:       loss_b = s / (sqrt(s + c^2) + c), s = sum r^2;    dpred = grad_b r / sqrt(s + c^2)
    elementwise:  loss_b = mean r^2 / (sqrt(r^2 + c^2) + c);        dpred = grad_b / D r / sqrt(r^2 + c^2)

Forward: one program a tile of a row for its sum, one a row to add them in a fixed order. Backward: one program a tile.
Floor: both tensors read once; backward reads them again and writes one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power, refuse_double, row_tile

BLOCK = 2048


@triton.jit
def load_residual(pred, target, at, mask):
    """pred - target in float32, 0 in masked lanes."""
    return tl.load(pred + at, mask=mask, other=0.0).to(tl.float32) - tl.load(target + at, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _tile_sum_kernel(pred, target, c, size, tiles, o_part, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    r = load_residual(pred, target, row * size + cols, cols < size)  # [BLOCK]
    square = r * r
    if not VECTOR:
        square = square / (tl.sqrt_rn(square + c * c) + c)
    tl.store(o_part + row * tiles + tile, tl.sum(square, 0))


@triton.jit
def _merge_kernel(i_part, c, size, tiles, o_loss, o_inverse, VECTOR: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    s = tl.sum(tl.load(i_part + row * tiles + i, mask=i < tiles, other=0.0), 0)
    if VECTOR:
        root = tl.sqrt_rn(s + c * c)
        tl.store(o_loss + row, s / (root + c))
        tl.store(o_inverse + row, 1.0 / root)
    else:
        tl.store(o_loss + row, s / size)


@triton.jit
def _gradient_kernel(grad, pred, target, inverse, c, size, tiles, o_pred, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    r = load_residual(pred, target, row * size + cols, cols < size)
    g = tl.load(grad + row).to(tl.float32)
    if VECTOR:
        d = r * (g * tl.load(inverse + row))
    else:
        d = r / tl.sqrt_rn(r * r + c * c) * (g / size)
    tl.store(o_pred + row * size + cols, d.to(o_pred.dtype.element_ty), mask=cols < size)


def launch_pseudo_huber_loss(pred: Any, target: Any, c: float, vector: bool) -> tuple[Any, Any]:
    """Arguments of `pseudo_huber_loss` -> (loss, inverse)."""
    pred, target = pred.contiguous(), target.contiguous()
    rows, size = pred.shape
    f32, tiles = dtype(pred, "float32"), cdiv(size, BLOCK)
    part = pred.new_empty((rows, tiles), dtype=f32)
    loss, inverse = (pred.new_empty((n,), dtype=f32) for n in (rows, rows if vector else 0))
    launch(_tile_sum_kernel, rows * tiles, pred, pred, target, c, size, tiles, part, VECTOR=vector, BLOCK=BLOCK)
    launch(_merge_kernel, rows, pred, part, c, size, tiles, loss, inverse, VECTOR=vector, TILES=next_power(tiles))
    return loss, inverse


def launch_pseudo_huber_backward(grad: Any, pred: Any, target: Any, inverse: Any, c: float) -> Any:
    """Arguments of `pseudo_huber_backward` -> gradient in pred."""
    pred, target, grad = pred.contiguous(), target.contiguous(), grad.contiguous()
    rows, size = pred.shape
    out, tiles = pred.new_empty((rows, size)), cdiv(size, BLOCK)
    launch(
        _gradient_kernel, rows * tiles, pred, grad, pred, target, inverse, c, size, tiles, out,
        VECTOR=inverse.shape[0] > 0, BLOCK=BLOCK,
    )
    return out


def supports_pseudo_huber_loss(*args: Any) -> str | None:
    """The reason these arguments cannot be served, or None."""
    return refuse_double(*args[:2])


def supports_pseudo_huber_backward(*args: Any) -> str | None:
    """The same for the gradient."""
    return refuse_double(*args[:4])


def aot_cases() -> list[AotCase]:
    """A batch of small images in both forms and dtypes."""

    def run(name: str, kind: str, vector: bool) -> AotCase:
        def call() -> None:
            pred, target, row = Meta((512, 3072), kind), Meta((512, 3072), kind), Meta((512,), "float32")
            launch_pseudo_huber_loss(pred, target, 0.03, vector)
            launch_pseudo_huber_backward(row, pred, target, row if vector else Meta((0,), "float32"), 0.03)

        return AotCase(name, call)

    return [run("fp32-vector", "float32", True), run("bf16-elementwise", "bfloat16", False)]
