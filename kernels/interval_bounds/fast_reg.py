"""Nine sums over bounds before a ReLU on a GPU: a program writes its blocks' sums in float64, a sum over programs is
the second pass. Backward: one read of the bounds, one write. 8 bytes an entry forward, 16 backward."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, refuse_double

BLOCK = 1024


@triton.jit
def _moments_kernel(i_l, i_u, o_sums, count, steps, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros((16,), tl.float64)
    lane = tl.arange(0, 16)
    for step in range(0, steps):
        at = (pid.to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        mask = at < count
        low = tl.load(i_l + at, mask=mask, other=0.0).to(tl.float64)
        high = tl.load(i_u + at, mask=mask, other=0.0).to(tl.float64)
        c = (low + high) * 0.5
        active, dead = (low > 0.0).to(tl.float64), (high < 0.0).to(tl.float64)
        total += tl.where(lane == 0, tl.sum(high - low, 0), 0.0)
        total += tl.where(lane == 1, tl.sum(c, 0), 0.0) + tl.where(lane == 2, tl.sum(c * c, 0), 0.0)
        total += tl.where(lane == 3, tl.sum(active, 0), 0.0) + tl.where(lane == 4, tl.sum(c * active, 0), 0.0)
        total += tl.where(lane == 5, tl.sum(c * c * active, 0), 0.0) + tl.where(lane == 6, tl.sum(dead, 0), 0.0)
        total += tl.where(lane == 7, tl.sum(c * dead, 0), 0.0) + tl.where(lane == 8, tl.sum(c * c * dead, 0), 0.0)
    tl.store(o_sums + pid * 9 + lane, total, mask=lane < 9)


@triton.jit
def _gradient_kernel(i_g, i_l, i_u, o_l, o_u, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    low = tl.load(i_l + at, mask=mask, other=0.0).to(tl.float64)
    high = tl.load(i_u + at, mask=mask, other=0.0).to(tl.float64)
    c = (low + high) * 0.5
    first = tl.load(i_g + 1) + tl.where(low > 0.0, tl.load(i_g + 4), 0.0) + tl.where(high < 0.0, tl.load(i_g + 7), 0.0)
    second = tl.load(i_g + 2) + tl.where(low > 0.0, tl.load(i_g + 5), 0.0) + tl.where(high < 0.0, tl.load(i_g + 8), 0.0)
    half, width = 0.5 * first + c * second, tl.load(i_g)
    tl.store(o_l + at, (half - width).to(tl.float32).to(o_l.dtype.element_ty), mask=mask)
    tl.store(o_u + at, (half + width).to(tl.float32).to(o_u.dtype.element_ty), mask=mask)


def launch_interval_moments(lower: Any, upper: Any) -> Any:
    """Arguments of `interval_moments` -> sums ``[9]``; the number of programs depends on the size alone."""
    return _partial_sums(lower, upper).sum(0)


def _partial_sums(lower: Any, upper: Any) -> Any:
    (count,) = lower.shape
    steps = max(1, cdiv(count, BLOCK * 1024))
    programs = cdiv(count, BLOCK * steps)
    sums = lower.new_empty((programs, 9), dtype=dtype(lower, "float64"))
    launch(_moments_kernel, programs, lower, lower, upper, sums, count, steps, BLOCK=BLOCK)
    return sums


def supports_interval_moments_backward(grad: Any, lower: Any, upper: Any) -> str | None:
    """Why this call cannot be served; sums, and so their gradients, are float64 whatever the bounds are."""
    return refuse_double(lower, upper)


def launch_interval_moments_backward(grad: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """Arguments of `interval_moments_backward` -> (dlower, dupper)."""
    dl, du = lower.new_empty(tuple(lower.shape)), upper.new_empty(tuple(upper.shape))
    (count,) = lower.shape
    launch(_gradient_kernel, cdiv(count, BLOCK), lower, grad, lower, upper, dl, du, count, BLOCK=BLOCK)
    return dl, du


def aot_cases() -> list[AotCase]:
    """One hidden layer of CNN7, both passes."""

    def case(kind: str) -> None:
        bounds, grad = Meta((128 * 64 * 32 * 32,), kind), Meta((9,), "float64")
        _partial_sums(bounds, bounds)
        launch_interval_moments_backward(grad, bounds, bounds)

    return [AotCase("fp32", lambda: case("float32")), AotCase("bf16", lambda: case("bfloat16"))]
