"""Worst-case margins on a GPU: z_ik = D m + |D| r + b_k - b_y with D = W_k - W_y formed in registers.

Forward: a program owns one sample and BLOCK_C classes and walks over d. Gradient: one kernel a sample and BLOCK_D
columns walks over the classes (dm, dr, and what the label's row of W loses); one a tile [BLOCK_C, BLOCK_D] of W walks
over the samples. No atomics. W is read from L2 once a sample; 4 B C d FLOPs forward, 10 backward.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch, next_power, refuse_double
from .dual import TINY, UNIT, centered, centered_sound, eta_and_grow, turned


@triton.jit
def _margin_kernel(
    i_a, i_b, s_a, s_b, i_w, s_w, i_bias, i_y, o_z, classes, d, eta, grow, spread,
    BOUNDS: tl.constexpr, SOUND: tl.constexpr, SPREAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(classes, BLOCK_C)
    row = (pid // blocks).to(tl.int64)
    cls = (pid % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask, y = cls < classes, tl.load(i_y + row)
    m = tl.zeros((BLOCK_C,), tl.float32)
    r = tl.zeros((BLOCK_C,), tl.float32)
    size_k = tl.zeros((BLOCK_C,), tl.float32)  # of the terms of both logits
    size_y = tl.zeros((1,), tl.float32)
    for start in range(0, d, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        fine = at < d
        a = tl.load(i_a + row * s_a + at, mask=fine, other=0.0)
        b = tl.load(i_b + row * s_b + at, mask=fine, other=0.0)
        if SOUND:
            c, q = centered_sound(a, b, eta, BOUNDS)
        else:
            c, q = centered(a, b, BOUNDS)
        own = tl.load(i_w + y * s_w + at, mask=fine, other=0.0).to(tl.float32)
        w = tl.load(i_w + cls[:, None] * s_w + at[None, :], mask=mask[:, None] & fine[None, :], other=0.0).to(
            tl.float32
        )  # [BLOCK_C, BLOCK_D]
        diff = w - own[None, :]
        m += tl.sum(diff * c[None, :], 1)
        r += tl.sum(tl.abs(diff) * q[None, :], 1)
        if SPREAD:
            most = tl.abs(c) + q
            size_k += tl.sum(tl.abs(w) * most[None, :], 1)
            size_y += tl.sum((tl.abs(own) * most)[None, :], 1)
    step = tl.zeros((BLOCK_C,), tl.float32)
    if i_bias is not None:
        shift, base = tl.load(i_bias + cls, mask=mask, other=0.0).to(tl.float32), tl.load(i_bias + y).to(tl.float32)
        step = shift - base
        if SPREAD:
            size_k, size_y = size_k + tl.abs(shift), size_y + tl.abs(base)
    if SOUND:
        r = r * grow + TINY
        if SPREAD:  # four times a size overflows where partial sums may
            r += (4.0 * size_k + 4.0 * size_y) * (spread * grow) + 4.0 * TINY
        size = tl.abs(m) + r + tl.abs(step)
        z = tl.where(size < INF, m + r + step + 8.0 * UNIT * size, INF)
    else:
        z = m + r + step
    tl.store(o_z + row * classes + cls, tl.where(cls == y, 0.0, z), mask=mask)


@triton.jit
def _loss_kernel(i_z, i_y, o_loss, o_worst, classes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    z = tl.load(i_z + row * classes + at, mask=at < classes, other=-INF)
    bad = tl.max((z != z).to(tl.int32), 0) > 0
    worst = tl.max(tl.where((at == tl.load(i_y + row)) | (z != z), -INF, z), 0)
    top = tl.maximum(worst, 0.0)
    loss = tl.log(tl.sum(tl.where(at < classes, tl.exp(z - tl.where(top < INF, top, 0.0)), 0.0), 0)) + top
    nan = float("nan")
    tl.store(o_worst + row, tl.where(bad, nan, worst))
    tl.store(o_loss + row, tl.where(bad, nan, loss))


@triton.jit
def _sample_kernel(
    i_g, i_a, i_b, s_a, s_b, i_w, s_w, i_y, o_a, o_b, o_taken, classes, d,
    BOUNDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(d, BLOCK_D)
    row = (pid // blocks).to(tl.int64)
    at = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    fine, y = at < d, tl.load(i_y + row)
    c, q = centered(
        tl.load(i_a + row * s_a + at, mask=fine, other=0.0), tl.load(i_b + row * s_b + at, mask=fine, other=0.0), BOUNDS
    )
    own = tl.load(i_w + y * s_w + at, mask=fine, other=0.0).to(tl.float32)
    dm = tl.zeros((BLOCK_D,), tl.float32)
    dr = tl.zeros((BLOCK_D,), tl.float32)
    taken = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, classes, BLOCK_C):
        cls = start + tl.arange(0, BLOCK_C)
        mask = cls < classes
        g = tl.load(i_g + row * classes + cls, mask=mask & (cls != y), other=0.0)
        w = tl.load(
            i_w + cls[:, None].to(tl.int64) * s_w + at[None, :], mask=mask[:, None] & fine[None, :], other=0.0
        ).to(tl.float32)  # [BLOCK_C, BLOCK_D]
        diff = w - own[None, :]
        dm += tl.sum(g[:, None] * diff, 0)
        dr += tl.sum(g[:, None] * tl.abs(diff), 0)
        taken += tl.sum(g[:, None] * (c[None, :] + turned(diff, q[None, :])), 0)
    if BOUNDS:
        dm, dr = (dm - dr) * 0.5, (dm + dr) * 0.5
    if o_a is not None:
        tl.store(o_a + row * d + at, dm.to(o_a.dtype.element_ty), mask=fine)
        tl.store(o_b + row * d + at, dr.to(o_b.dtype.element_ty), mask=fine)
    tl.store(o_taken + row * d + at, taken, mask=fine)


@triton.jit
def _weight_kernel(
    i_g, i_a, i_b, s_a, s_b, i_w, s_w, i_y, i_taken, o_w, batch, classes, d,
    BOUNDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(d, BLOCK_D)
    cls = (pid // blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask, fine = cls < classes, at < d
    w = tl.load(i_w + cls[:, None] * s_w + at[None, :], mask=mask[:, None] & fine[None, :], other=0.0).to(
        tl.float32
    )  # [BLOCK_C, BLOCK_D]
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for i in range(0, batch):
        row = tl.cast(i, tl.int64)
        y = tl.load(i_y + row)
        c, q = centered(
            tl.load(i_a + row * s_a + at, mask=fine, other=0.0),
            tl.load(i_b + row * s_b + at, mask=fine, other=0.0),
            BOUNDS,
        )
        own = tl.load(i_w + y * s_w + at, mask=fine, other=0.0).to(tl.float32)
        g = tl.load(i_g + row * classes + cls, mask=mask & (cls != y), other=0.0)
        taken = tl.load(i_taken + row * d + at, mask=fine, other=0.0)
        moved = g[:, None] * (c[None, :] + turned(w - own[None, :], q[None, :]))
        total += moved - tl.where((cls == y)[:, None], taken[None, :], 0.0)
    tl.store(o_w + cls[:, None] * d + at[None, :], total.to(o_w.dtype.element_ty), mask=mask[:, None] & fine[None, :])


def config(classes: int) -> dict[str, Any]:
    """Tiles of W of at most 2,048 elements."""
    return {"BLOCK_C": min(32, max(2, next_power(classes))), "BLOCK_D": 64, "num_warps": 4}


def launch_margin_logits(
    a: Any, b: Any, weight: Any, bias: Any, y: Any, bounds: bool, sound: bool, spread: float
) -> Any:
    """Arguments of `margin_logits` -> z ``[B, C]``."""
    (batch, d), classes, options = a.shape, weight.shape[0], config(weight.shape[0])
    z = a.new_empty((batch, classes), dtype=dtype(a, "float32"))
    launch(
        _margin_kernel, batch * cdiv(classes, options["BLOCK_C"]), a, a, b, a.stride(0), b.stride(0), weight,
        weight.stride(0), bias, y, z, classes, d, *eta_and_grow(d + 10),
        spread / 4 * (1 + 2.0**-20), BOUNDS=bounds, SOUND=sound, SPREAD=sound and spread > 0, **options,
    )  # fmt: skip
    return z


def launch_margin_cross_entropy(
    a: Any, b: Any, weight: Any, bias: Any, y: Any, bounds: bool, sound: bool, spread: float
) -> tuple[Any, Any, Any]:
    """Arguments of `margin_cross_entropy` -> (loss, worst, z)."""
    z = launch_margin_logits(a, b, weight, bias, y, bounds, sound, spread)
    loss, worst = z.new_empty((z.shape[0],)), z.new_empty((z.shape[0],))
    launch(_loss_kernel, z.shape[0], z, z, y, loss, worst, z.shape[1], BLOCK=next_power(z.shape[1]))
    return loss, worst, z


def launch_margin_logits_backward(
    grad: Any, a: Any, b: Any, weight: Any, y: Any, bounds: bool, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Any, Any, Any, Any]:
    """Arguments of `margin_logits_backward` -> (da, db, dweight, dbias), of shape [0] where not wanted."""
    (batch, d), classes, options = a.shape, weight.shape[0], config(weight.shape[0])
    da, db = (a.new_empty((batch, d) if need_x else (0,)) for _ in range(2))
    dweight, dbias = a.new_empty((classes, d) if need_weight else (0,)), a.new_empty((0,))
    blocks, strides = cdiv(d, options["BLOCK_D"]), (a.stride(0), b.stride(0))
    if need_x or need_weight:
        taken = grad.new_empty((batch, d))
        launch(
            _sample_kernel, batch * blocks, a, grad, a, b, *strides, weight, weight.stride(0), y,
            da if need_x else None, db if need_x else None, taken, classes, d, BOUNDS=bounds, **options,
        )  # fmt: skip
    if need_weight:
        launch(
            _weight_kernel, blocks * cdiv(classes, options["BLOCK_C"]), a, grad, a, b, *strides, weight,
            weight.stride(0), y, taken, dweight, batch, classes, d, BOUNDS=bounds, **options,
        )  # fmt: skip
    if need_bias:
        label = y.new_zeros((batch, classes)).scatter(1, y[:, None], 1)
        other = grad * (1 - label)
        dbias = (other.sum(0) - (other.sum(1, keepdim=True) * label).sum(0)).to(a.dtype)
    return da, db, dweight, dbias


def supports_margin_cross_entropy(a: Any, b: Any, weight: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if weight.shape[0] > 65536:
        return "more than 65,536 classes do not fit one program of the loss; plain PyTorch serves them"
    return refuse_double(a)


def aot_cases() -> list[AotCase]:
    """Ten classes in float32, 200 in bfloat16, forward and backward."""

    def case(kind: str, batch: int, d: int, classes: int, sound: bool, spread: float = 0.0) -> None:
        a, weight, y = Meta((batch, d), kind), Meta((classes, d), kind), Meta((batch,), "int64")
        launch_margin_cross_entropy(a, a, weight, Meta((classes,), kind), y, True, sound, spread)
        grad = Meta((batch, classes), "float32")
        launch_margin_logits_backward(grad, a, a, weight, y, True, True, True, False)

    return [
        AotCase("fp32-b128-d512-c10", lambda: case("float32", 128, 512, 10, False)),
        AotCase("fp32-b128-d512-c10-sound", lambda: case("float32", 128, 512, 10, True)),
        AotCase("fp32-b128-d512-c10-spread", lambda: case("float32", 128, 512, 10, True, 1e-4)),
        AotCase("bf16-b128-d512-c200", lambda: case("bfloat16", 128, 512, 200, False)),
    ]
