"""LayerNorm or RMSNorm of slots [first, last) of x [B, N, S, C], the other slots copied, and the gradient.

Forward: one program a token and slot. Backward: one program a slot and a range of tokens, which keeps its part of
dweight and dbias in registers; ranges are added in order afterwards. Floor: x read, y written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power

#: Tokens of a range.
RANGE = 32


@triton.jit
def _place(x, row, N, s):
    """Where slot s of token row (over all samples) starts."""
    return x[0] + row // N * x[1] + row % N * x[2] + s * x[3]


@triton.jit
def _forward_kernel(
    x, first, last, weight, weight_step, bias, bias_step, y, stats, N, S, C, eps, RMS: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    row, s = pid // S, pid % S
    c = tl.arange(0, BLOCK)
    mask = c < C
    raw = tl.load(_place(x, row, N, s) + c, mask=mask, other=0.0)
    if (s < first) | (s >= last):
        tl.store(y + pid * C + c, raw, mask=mask)
    else:
        a = raw.to(tl.float32)
        mean = 0.0
        if not RMS:
            mean = tl.sum(a, 0) / C
        a = tl.where(mask, a - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a, 0) / C + eps)
        line = (row * (last - first) + s - first) * 2
        tl.store(stats + line, mean)
        tl.store(stats + line + 1, rstd)
        a *= rstd
        if weight is not None:
            a *= tl.load(weight + (s - first) * weight_step + c, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            a += tl.load(bias + (s - first) * bias_step + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + pid * C + c, a.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad, x, first, last, weight, weight_step, stats, dx, partial, rows, N, S, C,
    RMS: tl.constexpr, RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial is [ranges, last - first, 2, C]: dweight, dbias."""
    pid = tl.program_id(0).to(tl.int64)
    part, s = pid // S, pid % S
    c = tl.arange(0, BLOCK)
    mask = c < C
    normed = (s >= first) & (s < last)
    slots = last - first
    gain = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        gain = tl.load(weight + (s - first) * weight_step + c, mask=mask & normed, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(RANGE):
        row = part * RANGE + i
        live = mask & (row < rows)
        raw = tl.load(_place(grad, row, N, s) + c, mask=live, other=0.0)
        up = raw.to(tl.float32)
        line = (row * slots + s - first) * 2
        mean = tl.load(stats + line, mask=normed & (row < rows), other=0.0)
        rstd = tl.load(stats + line + 1, mask=normed & (row < rows), other=0.0)
        a = tl.load(_place(x, row, N, s) + c, mask=live, other=0.0).to(tl.float32)
        unit = tl.where(live, (a - mean) * rstd, 0.0)
        dweight += up * unit
        dbias += up
        g = up * gain
        inner = g - unit * (tl.sum(g * unit, 0) / C)
        if not RMS:
            inner -= tl.sum(g, 0) / C
        d = tl.where(normed, (rstd * inner).to(dx.dtype.element_ty), raw.to(dx.dtype.element_ty))
        tl.store(dx + (row * S + s) * C + c, d, mask=live)
    if partial is not None:
        out = partial + (part * slots + s - first) * 2 * C + c
        tl.store(out, dweight, mask=mask & normed)
        tl.store(out + C, dbias, mask=mask & normed)


def _places(t: Any) -> tuple[Any, ...]:
    return (t, t.stride(0), t.stride(1), t.stride(2))


def _step(p: Any) -> int:
    """From one slot's parameters to the next's."""
    return p.shape[1] if p is not None and p.shape[0] > 1 else 0


def _warps(channels: int) -> int:
    return 1 if channels <= 128 else 4 if channels <= 1024 else 8


def launch_qk_norm(
    x: Any, first: int, last: int, weight: Any, bias: Any, rms: bool, eps: float
) -> tuple[Any, Any]:
    """Arguments of `qk_norm` -> (y, stats)."""
    batch, n, s, c = x.shape
    y = x.new_empty(x.shape)
    stats = x.new_empty((batch, n, last - first, 2), dtype=dtype(x, "float32"))
    launch(
        _forward_kernel, batch * n * s, x, _places(x), first, last, weight, _step(weight), bias, _step(bias), y, stats,
        n, s, c, eps, RMS=rms, BLOCK=next_power(c), num_warps=_warps(c),
    )  # fmt: skip
    return y, stats


def backward(
    grad: Any, x: Any, first: int, last: int, weight: Any, rms: bool, stats: Any, need_params: bool
) -> tuple[Any, Any]:
    """dx and the partial sums ``[ranges, slots, 2, C]`` (None unless needed)."""
    batch, n, s, c = x.shape
    dx = x.new_empty(x.shape)
    ranges = cdiv(batch * n, RANGE)
    partial = x.new_empty((ranges, last - first, 2, c), dtype=dtype(x, "float32")) if need_params else None
    launch(
        _backward_kernel, ranges * s, x, _places(grad), _places(x), first, last, weight, _step(weight), stats, dx,
        partial, batch * n, n, s, c, RMS=rms, RANGE=RANGE, BLOCK=next_power(c), num_warps=_warps(c),
    )  # fmt: skip
    return dx, partial


def launch_qk_norm_backward(
    grad: Any, x: Any, first: int, last: int, weight: Any, bias: Any, rms: bool, stats: Any, need_params: bool
) -> tuple[Any, Any, Any]:
    """Arguments of `qk_norm_backward` -> (dx, dweight, dbias)."""
    dx, partial = backward(grad, x, first, last, weight, rms, stats, need_params)
    found = []
    for at, p in enumerate((weight, bias)):
        if partial is None or p is None:
            found.append(x.new_empty((0,), dtype=dtype(x, "float32")))
            continue
        total = partial[:, :, at].sum(0)
        found.append(total if p.shape[0] > 1 or total.shape[0] == 1 else total.sum(0, keepdim=True))
    return dx, found[0], found[1]


def aot_cases() -> list[AotCase]:
    """q and k of a packed qkv over 1152 channels, and heads of 72 by RMS."""

    def case(kind: str, slots: int, last: int, c: int, sets: int, rms: bool) -> Any:
        x, weight = Meta((2, 4096, slots, c), kind), Meta((sets, c), "float32")

        def run() -> None:
            launch_qk_norm(x, 0, last, weight, weight, rms, 1e-5)
            backward(x, x, 0, last, weight, rms, Meta((2, 4096, last, 2), "float32"), True)

        return run

    return [
        AotCase("bf16-layer-c1152", case("bfloat16", 3, 2, 1152, 2, False)),
        AotCase("bf16-rms-d72", case("bfloat16", 16, 16, 72, 1, True)),
    ]
