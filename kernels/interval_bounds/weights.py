"""interval_linear_iw on a GPU: a program owns a small tile of outputs (or of gradients) and walks over the contraction
with the products of a tile in registers, [BLOCK_B, BLOCK_N, BLOCK_K] elements at a time. No matrix units: the ends of a
product are chosen an element. MODE 0: nonneg, 1: general, 2: midrad; reference/interval_bounds/weights.py has them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Group, Meta, cdiv, dtype, launch
from .dual import SMALLEST, TINY, UNIT, narrow_outward, turned


@triton.jit
def _tile(p, rows, cols, stride, mask):
    return tl.load(p + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _products(xl, xu, wl, wu, MODE: tl.constexpr):
    """Lower and upper part of each element (midrad: centre and radius)."""
    if MODE == 0:
        return wl * tl.where(wl >= 0.0, xl, xu), wu * tl.where(wu >= 0.0, xu, xl)
    if MODE == 1:
        a, b, c, d = wl * xl, wl * xu, wu * xl, wu * xu
        return tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    cx, rx, cw, rw = (xl + xu) * 0.5, (xu - xl) * 0.5, (wl + wu) * 0.5, (wu - wl) * 0.5
    return cx * cw, tl.abs(cx) * rw + rx * (tl.abs(cw) + rw)


@triton.jit
def _spread(low, high, eta, least, COMMON: tl.constexpr):
    """Ends moved apart so that sums are sound: csrc/cpu/interval_bounds/linear.h."""
    a, b = tl.abs(low), tl.abs(high)
    known = a + b < INF
    if COMMON:
        a = tl.maximum(a, b)
        b = a
    low = tl.where(known, low - tl.where(a > 0.0, a * eta + least, 0.0), float("nan"))
    return low, tl.where(known, high + tl.where(b > 0.0, b * eta + least, 0.0), float("nan"))


@triton.jit
def _end(g, a, b, c, d, xl, xu, wl, wu):
    """Gradients (x_l, x_u, w_l, w_u) of the smallest of the products a, b, c, d; the first of equal ones counts."""
    second = tl.minimum(a, b) > tl.minimum(c, d)
    x_up = tl.where(second, c > d, a > b)
    to_x, to_w = g * tl.where(second, wu, wl), g * tl.where(x_up, xu, xl)
    return (
        tl.where(x_up, 0.0, to_x),
        tl.where(x_up, to_x, 0.0),
        tl.where(second, 0.0, to_w),
        tl.where(second, to_w, 0.0),
    )


@triton.jit
def _gradients(gl, gu, xl, xu, wl, wu, MODE: tl.constexpr):
    """Each element's part of the gradients of x_l, x_u, w_l, w_u."""
    if MODE == 0:
        low, high, a, b = wl >= 0.0, wu >= 0.0, gl * wl, gu * wu
        return (
            tl.where(low, a, 0.0) + tl.where(high, 0.0, b),
            tl.where(low, 0.0, a) + tl.where(high, b, 0.0),
            gl * tl.where(low, xl, xu),
            gu * tl.where(high, xu, xl),
        )
    if MODE == 1:
        a, b, c, d = wl * xl, wl * xu, wu * xl, wu * xu
        p, q, r, s = _end(gl, a, b, c, d, xl, xu, wl, wu)
        t, u, v, w = _end(gu, -a, -b, -c, -d, xl, xu, wl, wu)
        return p + t, q + u, r + v, s + w
    cx, rx, cw, rw = (xl + xu) * 0.5, (xu - xl) * 0.5, (wl + wu) * 0.5, (wu - wl) * 0.5
    gc, gr = gl + gu, gu - gl
    dcx, drx = gc * cw + turned(cx, gr * rw), gr * (tl.abs(cw) + rw)
    dcw, drw = gc * cx + turned(cw, gr * rx), gr * (tl.abs(cx) + rx)
    return (dcx - drx) * 0.5, (dcx + drx) * 0.5, (dcw - drw) * 0.5, (dcw + drw) * 0.5


@triton.jit
def _forward_kernel(
    xl, xm, xu, sl, sm, su, wl, wm, wu, tl_, tm, tu, ol, om, ou, batch, n, k, eta,
    MODE: tl.constexpr, SOUND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    rows = (pid // blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    low = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    mid = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    high = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        x_mask, w_mask = (rows < batch)[:, None] & (at < k)[None, :], (cols < n)[:, None] & (at < k)[None, :]
        a, c, b = _tile(xl, rows, at, sl, x_mask), _tile(xm, rows, at, sm, x_mask), _tile(xu, rows, at, su, x_mask)
        d, f, e = _tile(wl, cols, at, tl_, w_mask), _tile(wm, cols, at, tm, w_mask), _tile(wu, cols, at, tu, w_mask)
        if SOUND:
            a, b = _spread(a, b, eta, SMALLEST, MODE == 2)
            d, e = _spread(d, e, eta if MODE == 2 else 0.0, SMALLEST if MODE == 2 else 0.0, MODE == 2)
        p, q = _products(a[:, None, :], b[:, None, :], d[None, :, :], e[None, :, :], MODE)
        low += tl.sum(p, 2)
        high += tl.sum(q, 2)
        mid += tl.sum(c[:, None, :] * f[None, :, :], 2)
    if MODE == 2:
        low, high = low - high, low + high
    if SOUND:
        known = tl.abs(low) + tl.abs(high) < INF
        low = tl.where(known, low - (tl.abs(low) * (4.0 * UNIT) + TINY), -INF)
        high = tl.where(known, high + (tl.abs(high) * (4.0 * UNIT) + TINY), INF)
    at, mask = rows[:, None] * n + cols[None, :], (rows < batch)[:, None] & (cols < n)[None, :]
    tl.store(ol + at, low.to(ol.dtype.element_ty), mask=mask)
    tl.store(om + at, mid.to(om.dtype.element_ty), mask=mask)
    tl.store(ou + at, high.to(ou.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_kernel(
    gl, gm, gu, xl, xm, xu, sl, sm, su, wl, wm, wu, tl_, tm, tu, ol, om, ou, batch, n, k,
    MODE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of x, over the outputs, or (WEIGHT) of a tile of the weights, over the batch."""
    pid, blocks = tl.program_id(0), tl.cdiv(k, BLOCK_K)
    own = (pid // blocks).to(tl.int64)
    at = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    OWN: tl.constexpr = BLOCK_N if WEIGHT else BLOCK_B
    low = tl.zeros((OWN, BLOCK_K), tl.float32)
    mid = tl.zeros((OWN, BLOCK_K), tl.float32)
    high = tl.zeros((OWN, BLOCK_K), tl.float32)
    for start in range(0, batch if WEIGHT else n, BLOCK_B if WEIGHT else BLOCK_N):
        if WEIGHT:
            rows, cols = tl.arange(0, BLOCK_B).to(tl.int64) + start, own * BLOCK_N + tl.arange(0, BLOCK_N)
        else:
            rows, cols = own * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N).to(tl.int64) + start
        x_mask, w_mask = (rows < batch)[:, None] & (at < k)[None, :], (cols < n)[:, None] & (at < k)[None, :]
        g_mask = (rows < batch)[:, None] & (cols < n)[None, :]
        a, b = _tile(xl, rows, at, sl, x_mask)[:, None, :], _tile(xu, rows, at, su, x_mask)[:, None, :]
        d, e = _tile(wl, cols, at, tl_, w_mask)[None, :, :], _tile(wu, cols, at, tu, w_mask)[None, :, :]
        g, h = _tile(gl, rows, cols, n, g_mask)[:, :, None], _tile(gu, rows, cols, n, g_mask)[:, :, None]
        p, q, r, s = _gradients(g, h, a, b, d, e, MODE)
        middle = _tile(gm, rows, cols, n, g_mask)[:, :, None]
        if WEIGHT:
            low += tl.sum(r, 0)
            high += tl.sum(s, 0)
            mid += tl.sum(middle * _tile(xm, rows, at, sm, x_mask)[:, None, :], 0)
        else:
            low += tl.sum(p, 1)
            high += tl.sum(q, 1)
            mid += tl.sum(middle * _tile(wm, cols, at, tm, w_mask)[None, :, :], 1)
    rows = own * OWN + tl.arange(0, OWN)
    to, mask = rows[:, None] * k + at[None, :], (rows < (n if WEIGHT else batch))[:, None] & (at < k)[None, :]
    tl.store(ol + to, low.to(ol.dtype.element_ty), mask=mask)
    tl.store(om + to, mid.to(om.dtype.element_ty), mask=mask)
    tl.store(ou + to, high.to(ou.dtype.element_ty), mask=mask)


CONFIG = {"BLOCK_B": 8, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4}


def launch_interval_linear_iw(ends: Any, mode: int, sound: bool) -> tuple[Any, Any, Any]:
    """Arguments of `interval_linear_iw` -> (lower, middle, upper)."""
    xl, wl = ends.xl, ends.wl
    (batch, k), n = xl.shape, wl.shape[0]
    out = [xl.new_empty((batch, n), dtype=dtype(xl, "float32") if sound and i != 1 else xl.dtype) for i in range(3)]
    eta = (4.0 if mode == 2 else 1.0) * (k + 10) * 2.0**-24 * 1.01 + 16.0 * 2.0**-24
    programs = cdiv(batch, CONFIG["BLOCK_B"]) * cdiv(n, CONFIG["BLOCK_N"])
    x, w = (xl, ends.xm, ends.xu), (wl, ends.wm, ends.wu)
    strides = [t.stride(0) for t in x], [t.stride(0) for t in w]
    launch(
        _forward_kernel, programs, xl, *x, *strides[0], *w, *strides[1], *out, batch, n, k, eta, MODE=mode, SOUND=sound,
        **CONFIG,
    )  # fmt: skip
    if sound:
        return narrow_outward(out[0], xl, True), out[1], narrow_outward(out[2], xl, False)
    return out[0], out[1], out[2]


def launch_interval_linear_iw_backward(gl: Any, gm: Any, gu: Any, ends: Any, mode: int) -> tuple[Any, ...]:
    """Arguments of `interval_linear_iw_backward` -> gradients of x and of the weights."""
    g, x, w = (gl, gm, gu), (ends.xl, ends.xm, ends.xu), (ends.wl, ends.wm, ends.wu)
    (batch, k), n = x[0].shape, w[0].shape[0]
    dx, dw = [t.new_empty((batch, k)) for t in x], [t.new_empty((n, k)) for t in w]
    given = (*g, *x, *(t.stride(0) for t in x), *w, *(t.stride(0) for t in w))
    for weight, out, rows, block in ((False, dx, batch, "BLOCK_B"), (True, dw, n, "BLOCK_N")):
        programs = cdiv(rows, CONFIG[block]) * cdiv(k, CONFIG["BLOCK_K"])
        launch(_gradient_kernel, programs, x[0], *given, *out, batch, n, k, MODE=mode, WEIGHT=weight, **CONFIG)
    return (*dx, *dw)


def aot_cases() -> list[AotCase]:
    """A hidden layer in float32, each mode; nonneg in bfloat16; sound nonneg and midrad."""

    def case(kind: str, mode: int, sound: bool = False) -> None:
        x, w, g = [Meta((128, 1000), kind)] * 3, [Meta((1000, 1000), kind)] * 3, [Meta((128, 1000), kind)] * 3
        names = ("xl", "xm", "xu", "wl", "wm", "wu")
        ends = Group(**dict(zip(names, (*x, *w), strict=True)))
        launch_interval_linear_iw(ends, mode, sound)
        if not sound:
            launch_interval_linear_iw_backward(*g, ends, mode)

    return [
        AotCase("fp32-nonneg", lambda: case("float32", 0)),
        AotCase("fp32-general", lambda: case("float32", 1)),
        AotCase("fp32-midrad", lambda: case("float32", 2)),
        AotCase("bf16-nonneg", lambda: case("bfloat16", 0)),
        AotCase("fp32-sound-nonneg", lambda: case("float32", 0, True)),
        AotCase("fp32-sound-midrad", lambda: case("float32", 2, True)),
    ]
