"""interval_affine, interval_batchnorm_stats and their gradients on a GPU, tensors [B, C, size].

A program owns a block of one sample's entries, each with its channel's scale; another kernel sums a channel's gradients
in float64, over all samples in order. 16 bytes an entry forward, 40 backward.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch
from .dual import TINY, UNIT, narrow_outward, relu, through


@triton.jit
def _entries(channels, size, BLOCK: tl.constexpr):
    """Entries, their mask and their channels, of this program: a block of one sample's channels x size."""
    blocks = tl.cdiv(channels * size, BLOCK)
    pid = tl.program_id(0)
    inner = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = inner < channels * size
    return (pid // blocks).to(tl.int64) * channels * size + inner, mask, inner // size


@triton.jit
def _affine_kernel(
    i_l, i_u, i_s, i_t, o_l, o_u, channels, size, RELU: tl.constexpr, SOUND: tl.constexpr, BLOCK: tl.constexpr
):
    at, mask, channel = _entries(channels, size, BLOCK)
    low = tl.load(i_l + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(i_u + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(i_s + channel, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(i_t + channel, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.where(s < 0.0, high, low), tl.where(s < 0.0, low, high)
    x, y = s * first + t, s * second + t
    if SOUND:
        m, r = tl.abs(s * first) + tl.abs(t), tl.abs(s * second) + tl.abs(t)
        x = tl.where(m < INF, x - (m * (4.0 * UNIT) + TINY), -INF)
        y = tl.where(r < INF, y + (r * (4.0 * UNIT) + TINY), INF)
    if RELU:
        x, y = relu(x), relu(y)
    tl.store(o_l + at, x.to(o_l.dtype.element_ty), mask=mask)
    tl.store(o_u + at, y.to(o_u.dtype.element_ty), mask=mask)


@triton.jit
def _affine_gradient_kernel(
    i_gl, i_gu, i_l, i_u, i_s, i_low, i_high, o_l, o_u, channels, size, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    at, mask, channel = _entries(channels, size, BLOCK)
    g, h = tl.load(i_gl + at, mask=mask, other=0.0), tl.load(i_gu + at, mask=mask, other=0.0)
    low, high = g, h
    if RELU:
        low, high = tl.load(i_low + at, mask=mask, other=0.0), tl.load(i_high + at, mask=mask, other=0.0)
    g, h = through(g, h, low, high, False, RELU)
    s = tl.load(i_s + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_l + at, (tl.where(s < 0.0, h, g) * s).to(o_l.dtype.element_ty), mask=mask)
    tl.store(o_u + at, (tl.where(s < 0.0, g, h) * s).to(o_u.dtype.element_ty), mask=mask)


@triton.jit
def _affine_sums_kernel(
    i_gl, i_gu, i_l, i_u, i_s, i_low, i_high, o_s, o_t, batch, channels, size, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of one channel's scale and shift, over all samples in order."""
    channel = tl.program_id(0)
    s = tl.load(i_s + channel).to(tl.float32)
    scale = tl.zeros((BLOCK,), tl.float64)
    shift = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, batch * size, BLOCK):
        i = tl.arange(0, BLOCK).to(tl.int64) + start
        mask = i < batch * size
        at = (i // size * channels + channel) * size + i % size
        g, h = tl.load(i_gl + at, mask=mask, other=0.0), tl.load(i_gu + at, mask=mask, other=0.0)
        low, high = g, h
        if RELU:
            low, high = tl.load(i_low + at, mask=mask, other=0.0), tl.load(i_high + at, mask=mask, other=0.0)
        g, h = through(g, h, low, high, False, RELU)
        x = tl.load(i_l + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(i_u + at, mask=mask, other=0.0).to(tl.float32)
        scale += (tl.where(s < 0.0, h, g) * x + tl.where(s < 0.0, g, h) * y).to(tl.float64)
        shift += (g + h).to(tl.float64)
    tl.store(o_s + channel, tl.sum(scale, 0))
    tl.store(o_t + channel, tl.sum(shift, 0))


@triton.jit
def _stats_kernel(i_x, o_mean, o_var, batch, channels, size, BLOCK: tl.constexpr):
    """Two passes over one channel: the mean, then the mean square of what is left of it."""
    channel, count = tl.program_id(0), batch * size
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = tl.arange(0, BLOCK).to(tl.int64) + start
        at = (i // size * channels + channel) * size + i % size
        total += tl.load(i_x + at, mask=i < count, other=0.0).to(tl.float32).to(tl.float64)
    mean = tl.sum(total, 0) / count
    spread = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = tl.arange(0, BLOCK).to(tl.int64) + start
        at = (i // size * channels + channel) * size + i % size
        d = tl.load(i_x + at, mask=i < count, other=0.0).to(tl.float32).to(tl.float64) - mean
        spread += tl.where(i < count, d * d, 0.0)
    tl.store(o_mean + channel, mean.to(tl.float32))
    tl.store(o_var + channel, (tl.sum(spread, 0) / count).to(tl.float32))


@triton.jit
def _stats_gradient_kernel(i_g, i_h, i_x, i_mean, o_x, channels, size, factor, BLOCK: tl.constexpr):
    at, mask, channel = _entries(channels, size, BLOCK)
    x = tl.load(i_x + at, mask=mask, other=0.0).to(tl.float32)
    g, h = tl.load(i_g + channel, mask=mask, other=0.0), tl.load(i_h + channel, mask=mask, other=0.0)
    mean = tl.load(i_mean + channel, mask=mask, other=0.0)
    tl.store(o_x + at, ((g + 2.0 * h * (x - mean)) * factor).to(o_x.dtype.element_ty), mask=mask)


BLOCK = 1024


def _sizes(x: Any) -> tuple[int, int, int, int]:
    """Samples, channels, entries of a plane, and programs."""
    size = 1
    for n in x.shape[2:]:
        size *= n
    batch, channels = x.shape[:2]
    return batch, channels, size, batch * cdiv(channels * size, BLOCK)


def launch_interval_affine(lower: Any, upper: Any, scale: Any, shift: Any, act: bool, sound: bool) -> tuple[Any, Any]:
    """Arguments of `interval_affine` -> (low, high)."""
    _, channels, size, programs = _sizes(lower)
    kind = dtype(lower, "float32") if sound else lower.dtype
    low, high = (lower.new_empty(tuple(lower.shape), dtype=kind) for _ in range(2))
    launch(
        _affine_kernel, programs, lower, lower, upper, scale, shift, low, high, channels, size, RELU=act, SOUND=sound,
        BLOCK=BLOCK,
    )  # fmt: skip
    return (narrow_outward(low, lower, True), narrow_outward(high, lower, False)) if sound else (low, high)


def launch_interval_affine_backward(
    gl: Any, gu: Any, lower: Any, upper: Any, scale: Any, low: Any, high: Any, act: bool
) -> tuple[Any, Any, Any, Any]:
    """Arguments of `interval_affine_backward` -> (dlower, dupper, dscale, dshift)."""
    batch, channels, size, programs = _sizes(lower)
    given, wide = (gl, gu, lower, upper, scale, low, high), dtype(lower, "float64")
    dl, du = (lower.new_empty(tuple(lower.shape)) for _ in range(2))
    ds, dt = (scale.new_empty((channels,), dtype=wide) for _ in range(2))
    launch(_affine_gradient_kernel, programs, lower, *given, dl, du, channels, size, RELU=act, BLOCK=BLOCK)
    launch(_affine_sums_kernel, channels, lower, *given, ds, dt, batch, channels, size, RELU=act, BLOCK=BLOCK)
    return dl, du, _in(ds, scale), _in(dt, scale)


def _in(x: Any, like: Any) -> Any:
    return x if isinstance(x, Meta) else x.to(like.dtype)


def launch_interval_batchnorm_stats(x: Any) -> tuple[Any, Any]:
    """Argument of `interval_batchnorm_stats` -> (mean, var)."""
    batch, channels, size, _ = _sizes(x)
    mean, var = (x.new_empty((channels,), dtype=dtype(x, "float32")) for _ in range(2))
    launch(_stats_kernel, channels, x, x, mean, var, batch, channels, size, BLOCK=BLOCK)
    return mean, var


def launch_interval_batchnorm_stats_backward(grad_mean: Any, grad_var: Any, x: Any, mean: Any) -> Any:
    """Arguments of `interval_batchnorm_stats_backward` -> dx."""
    batch, channels, size, programs = _sizes(x)
    dx = x.new_empty(tuple(x.shape))
    launch(
        _stats_gradient_kernel, programs, x, grad_mean, grad_var, x, mean, dx, channels, size, 1.0 / (batch * size),
        BLOCK=BLOCK,
    )  # fmt: skip
    return dx


def aot_cases() -> list[AotCase]:
    """A convolutional layer of CNN7 in float32, a hidden one in bfloat16."""

    def case(kind: str, *shape: int, sound: bool = False) -> None:
        x, channel, wide = Meta(shape, kind), Meta((shape[1],), kind), Meta((shape[1],), "float32")
        launch_interval_affine(x, x, channel, channel, True, sound)
        launch_interval_affine_backward(x, x, x, x, channel, x, x, True)
        launch_interval_batchnorm_stats(x)
        launch_interval_batchnorm_stats_backward(wide, wide, x, wide)

    return [
        AotCase("fp32-b128-c64-32px", lambda: case("float32", 128, 64, 32, 32)),
        AotCase("fp32-sound", lambda: case("float32", 128, 64, 32, 32, sound=True)),
        AotCase("bf16-b128-c512", lambda: case("bfloat16", 128, 512)),
    ]
