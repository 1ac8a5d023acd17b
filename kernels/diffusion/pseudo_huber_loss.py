"""pseudo_huber_loss and ict_loss with their gradients.

r is pred - target, or k0 student + k1 teacher + k2 x_student + k3 x_teacher with the row's coefficients k.

    vector:       loss_b = s / (sqrt(s + c^2) + c), s = sum r^2;    dr = grad_b r / sqrt(s + c^2)
    elementwise:  loss_b = mean r^2 / (sqrt(r^2 + c^2) + c);        dr = grad_b / D r / sqrt(r^2 + c^2)

Forward: one program a tile of a row for its sum, one a row to add them in a fixed order. Backward: one program a tile.
Floor: every tensor read once; backward reads them again and writes one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, cdiv, dtype, launch, next_power, row_tile

BLOCK = 2048


@triton.jit
def load_number(tensor, at, mask):
    """float32, 0 in masked lanes."""
    return tl.load(tensor + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_residual(tensors, levels, row, at, mask):
    """r [BLOCK], 0 in masked lanes; student and teacher are formed apart, because the two are close."""
    first, second = load_number(tensors[0], at, mask), load_number(tensors[1], at, mask)
    if levels is None:
        r = first - second
    else:
        k = levels + 4 * row
        student = tl.load(k) * first + tl.load(k + 2) * load_number(tensors[2], at, mask)
        r = student + (tl.load(k + 1) * second + tl.load(k + 3) * load_number(tensors[3], at, mask))
    return r


@triton.jit
def _tile_sum_kernel(tensors, levels, c, size, tiles, o_part, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    r = load_residual(tensors, levels, row, row * size + cols, cols < size)
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
def _gradient_kernel(
    grad, tensors, levels, inverse, c, size, tiles, o_grad, COLUMN: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    r = load_residual(tensors, levels, row, row * size + cols, cols < size)
    g = tl.load(grad + row).to(tl.float32)
    if levels is not None:
        g *= tl.load(levels + 4 * row + COLUMN)
    if VECTOR:
        d = r * (g * tl.load(inverse + row))
    else:
        d = r / tl.sqrt_rn(r * r + c * c) * (g / size)
    tl.store(o_grad + row * size + cols, d.to(o_grad.dtype.element_ty), mask=cols < size)


def _forward(tensors: tuple[Any, ...], levels: Any, c: float, vector: bool) -> tuple[Any, Any]:
    tensors = tuple(t.contiguous() for t in tensors)
    like = tensors[0]
    rows, size = like.shape
    f32, tiles = dtype(like, "float32"), cdiv(size, BLOCK)
    part = like.new_empty((rows, tiles), dtype=f32)
    loss, inverse = (like.new_empty((n,), dtype=f32) for n in (rows, rows if vector else 0))
    launch(_tile_sum_kernel, rows * tiles, like, tensors, levels, c, size, tiles, part, VECTOR=vector, BLOCK=BLOCK)
    launch(_merge_kernel, rows, like, part, c, size, tiles, loss, inverse, VECTOR=vector, TILES=next_power(tiles))
    return loss, inverse


def _backward(grad: Any, tensors: tuple[Any, ...], levels: Any, inverse: Any, c: float, column: int) -> Any:
    tensors = tuple(t.contiguous() for t in tensors)
    rows, size = tensors[0].shape
    out, tiles = tensors[column].new_empty((rows, size)), cdiv(size, BLOCK)
    launch(
        _gradient_kernel, rows * tiles, out, grad.contiguous(), tensors, levels, inverse, c, size, tiles, out,
        COLUMN=column, VECTOR=inverse.shape[0] > 0, BLOCK=BLOCK,
    )
    return out


def launch_pseudo_huber_loss(pred: Any, target: Any, c: float, vector: bool) -> tuple[Any, Any]:
    """Arguments of `pseudo_huber_loss` -> (loss, inverse)."""
    return _forward((pred, target), None, c, vector)


def launch_pseudo_huber_backward(grad: Any, pred: Any, target: Any, inverse: Any, c: float) -> Any:
    """Arguments of `pseudo_huber_backward` -> gradient in pred."""
    return _backward(grad, (pred, target), None, inverse, c, 0)


def _tensors(given: Any) -> tuple[Any, ...]:
    return given.student, given.teacher, given.x_student, given.x_teacher


def launch_ict_loss(given: Any, c: float, vector: bool) -> tuple[Any, Any]:
    """Arguments of `ict_loss` -> (loss, inverse)."""
    return _forward(_tensors(given), given.levels.contiguous(), c, vector)


def launch_ict_backward(grad: Any, given: Any, inverse: Any, c: float, column: int) -> Any:
    """Arguments of `ict_backward` -> gradient in tensor ``column``."""
    return _backward(grad, _tensors(given), given.levels.contiguous(), inverse, c, column)


def aot_cases() -> list[AotCase]:
    """A batch of small images in both forms and dtypes, and the consistency loss."""

    def run(name: str, kind: str, vector: bool) -> AotCase:
        def call() -> None:
            pred, target, row = Meta((512, 3072), kind), Meta((512, 3072), kind), Meta((512,), "float32")
            launch_pseudo_huber_loss(pred, target, 0.03, vector)
            launch_pseudo_huber_backward(row, pred, target, row if vector else Meta((0,), "float32"), 0.03)

        return AotCase(name, call)

    def consistency() -> None:
        tensors = [Meta((512, 3072), "bfloat16") for _ in range(4)]
        levels, row = Meta((512, 4), "float32"), Meta((512,), "float32")
        names = ("student", "teacher", "x_student", "x_teacher", "levels")
        given = Group(**dict(zip(names, (*tensors, levels), strict=True)))
        launch_ict_loss(given, 0.03, True)
        launch_ict_backward(row, given, row, 0.03, 0)

    return [run("fp32-vector", "float32", True), run("bf16-elementwise", "bfloat16", False),
            AotCase("bf16-ict", consistency)]
