"""vandermonde_log on a GPU: ``e^{x (R q + r)} = e^{x R q} e^{x r}``, products of small tables.

A program has ROWS rows q of one feature and channel: two tables of float64 powers, of ROWS and of R positions, give
ROWS R results, 4 M operations each. Backward, a program has BLOCK poles of a feature and channel and goes over the rows
of the gradient. Floor: 4 M operations a result; it is written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch
from .numbers import keep_pair, pair, power, rounded

#: Positions of a row, rows of a program, and poles of a block.
R, ROWS, BLOCK = 64, 16, 16
#: Positions of a row of the gradient: a product along 64 does not fit the registers.
SHORT = 32


@triton.jit
def _factor(x, h, n, M):
    """Real part of x, and the imaginary one in turns."""
    re, im = pair(x, h, n, M)
    return re, im * 0.15915494309189535


@triton.jit
def _forward_kernel(c, x, out, H, M, L, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(L, R * ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    q = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    h = row % H
    r = tl.arange(0, R)
    total = tl.zeros((ROWS, R), tl.float32)
    for n0 in range(0, M, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        xr, xi = _factor(x, h, n, M)
        cr, ci = pair(c, row, n, M)
        pr, pi = power(xr[None, :], xi[None, :], (q * R)[:, None].to(tl.float64))
        left_re, left_im = cr[None, :] * pr - ci[None, :] * pi, cr[None, :] * pi + ci[None, :] * pr
        fr, fi = power(xr[:, None], xi[:, None], r[None, :].to(tl.float64))
        total = tl.dot((2.0 * left_re).to(tl.float32), fr.to(tl.float32), total, input_precision="ieee")
        total = tl.dot((-2.0 * left_im).to(tl.float32), fi.to(tl.float32), total, input_precision="ieee")
    at = q[:, None] * R + r[None, :]
    tl.store(out + row * L + at, total, mask=at < L)


@triton.jit
def _backward_kernel(
    grad, c, x, dc, dx, H, M, L, poles, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dc, and of each channel what dx is the sum of."""
    row = (tl.program_id(0) // poles).to(tl.int64)
    n = tl.program_id(0) % poles * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, R)
    xr, xi = _factor(x, row % H, n, M)
    fr, fi = power(xr[None, :], xi[None, :], r[:, None].to(tl.float64))
    fr, fi = fr.to(tl.float32), fi.to(tl.float32)
    zero = tl.zeros((BLOCK,), tl.float64)
    ar, ai, br, bi = zero, zero, zero, zero
    none = tl.zeros((ROWS, BLOCK), tl.float32)
    for q0 in range(0, tl.cdiv(L, R), ROWS):
        q = q0 + tl.arange(0, ROWS)
        at = q[:, None] * R + r[None, :]
        g = tl.load(grad + row * L + at, mask=at < L, other=0.0)
        later = g * r[None, :].to(tl.float32)
        ur, ui = tl.dot(g, fr, none, input_precision="ieee"), tl.dot(g, fi, none, input_precision="ieee")
        vr, vi = tl.dot(later, fr, none, input_precision="ieee"), tl.dot(later, fi, none, input_precision="ieee")
        first = (q * R)[:, None].to(tl.float64)
        er, ei = power(xr[None, :], xi[None, :], first)
        ur, ui = ur.to(tl.float64), ui.to(tl.float64)
        vr, vi = vr.to(tl.float64) + first * ur, vi.to(tl.float64) + first * ui
        ar += tl.sum(er * ur - ei * ui, 0)
        ai += tl.sum(er * ui + ei * ur, 0)
        br += tl.sum(er * vr - ei * vi, 0)
        bi += tl.sum(er * vi + ei * vr, 0)
    cr, ci = pair(c, row, n, M)
    keep_pair(dc, row, n, M, 2.0 * ar, -2.0 * ai)
    keep_pair(dx, row, n, M, 2.0 * (cr * br - ci * bi), -2.0 * (cr * bi + ci * br))


@triton.jit
def _channels_kernel(parts, out, count, C, BLOCK: tl.constexpr):
    """``[C, count]`` summed."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    place = at
    for _ in range(C):
        total += tl.load(parts + place, mask=at < count, other=0.0)
        place += count
    tl.store(out + at, rounded(total, out), mask=at < count)


def _refused(c: Any, length: int) -> str | None:
    if str(c.dtype).endswith("float64"):
        return "float64 weights are served by the reference; the kernels accumulate in float32"
    return "the kernels count positions in 32 bits" if length >= 2**31 - R * ROWS else None


def supports_vandermonde_log(c: Any, x: Any, length: int) -> str | None:
    """The reason this kernel cannot serve a call, or None."""
    return _refused(c, length)


def supports_vandermonde_log_backward(grad: Any, c: Any, x: Any, length: int) -> str | None:
    """The same for the gradient."""
    return _refused(c, length)


def launch_vandermonde_log(c: Any, x: Any, length: int) -> Any:
    """Arguments of `vandermonde_log` -> K ``[C, H, length]``."""
    channels, features, states, _ = c.shape
    out = c.new_empty((channels, features, length), dtype=dtype(c, "float32"))
    launch(
        _forward_kernel, channels * features * cdiv(length, R * ROWS), c, c, x, out, features, states, length, R=R,
        ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def launch_vandermonde_log_backward(grad: Any, c: Any, x: Any, length: int) -> tuple[Any, Any]:
    """Arguments of `vandermonde_log_backward` -> (dc, dx)."""
    channels, features, states, _ = c.shape
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    parts, poles = c.new_empty(c.shape, dtype=dtype(c, "float64")), cdiv(states, BLOCK)
    launch(
        _backward_kernel, channels * features * poles, c, grad, c, x, dc, parts, features, states, length, poles,
        R=SHORT, ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip
    count = features * states * 2
    launch(_channels_kernel, cdiv(count, 256), c, parts, dx, count, channels, BLOCK=256)
    return dc, dx


def aot_cases() -> list[AotCase]:
    """A layer of 64 states, two kernels of a feature."""

    def run(kind: str, length: int) -> None:
        c, x = Meta((2, 256, 32, 2), kind), Meta((256, 32, 2), "float64")
        launch_vandermonde_log(c, x, length)
        launch_vandermonde_log_backward(Meta((2, 256, length), "float32"), c, x, length)

    return [
        AotCase("fp32-L4096", lambda: run("float32", 4096)),
        AotCase("bf16-L1000", lambda: run("bfloat16", 1000)),
    ]
