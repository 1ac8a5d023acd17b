"""added = x + gate y and h = LN0(added) (1 + scale) + shift, either or both, and the gradient.

gate, shift and scale are a vector a sample or one a token.

Forward: one program a token, its row in registers. Backward: one program a range of tokens of a sample; it writes dx
and dy and keeps the sums over its tokens (dgate, dshift, dscale) in registers; ranges are added in order afterwards, no
atomics. The gradients of a gate and a scale a token are written at once.
Floor: x and y read, added and h written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power

#: Tokens of a range.
RANGE = 32


@triton.jit
def _vector(v, row, b, n, c, mask):
    """A modulation vector (tensor, stride from sample to sample, from token to token), with its table row."""
    x = tl.load(v[0] + b * v[1] + n * v[2] + c, mask=mask, other=0.0).to(tl.float32)
    if row is not None:
        x += tl.load(row + c, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _row(x, b, n, c, mask):
    """A token of (tensor, batch stride, token stride)."""
    return tl.load(x[0] + b * x[1] + n * x[2] + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, y, gate, gate_row, shift, shift_row, scale, scale_row, added, h, stats, N, C, eps, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    b, n = pid // N, pid % N
    c = tl.arange(0, BLOCK)
    mask = c < C
    a = _row(x, b, n, c, mask)
    if y is not None:
        step = _row(y, b, n, c, mask)
        if gate is not None:
            step *= _vector(gate, gate_row, b, n, c, mask)
        low = (a + step).to(added.dtype.element_ty)
        tl.store(added + pid * C + c, low, mask=mask)
        a = low.to(tl.float32)  # the LayerNorm is that of the rounded row, which backward sees
    if h is not None:
        mean = tl.sum(a, 0) / C
        a = tl.where(mask, a - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a, 0) / C + eps)
        tl.store(stats + pid * 2, mean)
        tl.store(stats + pid * 2 + 1, rstd)
        out = a * rstd * (1.0 + _vector(scale, scale_row, b, n, c, mask)) + _vector(shift, shift_row, b, n, c, mask)
        tl.store(h + pid * C + c, out.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_added, grad_h, added, y, gate, gate_row, scale, scale_row, stats, dx, dy, partial, dgates, dscales, N, C,
    ranges, NEED_GATE: tl.constexpr, GATES: tl.constexpr, SCALES: tl.constexpr, RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial is [B, ranges, 3, C]: dgate, dshift, dscale; GATES, SCALES: one a token, their gradients [B, N, C]."""
    pid = tl.program_id(0).to(tl.int64)
    b, part = pid // ranges, pid % ranges
    c = tl.arange(0, BLOCK)
    mask = c < C
    dgate = tl.zeros((BLOCK,), tl.float32)
    dshift, dscale = dgate, dgate
    gain = dgate
    if grad_h is not None and not SCALES:
        gain = 1.0 + _vector(scale, scale_row, b, 0, c, mask)
    factor = dgate
    if gate is not None and not GATES:
        factor = _vector(gate, gate_row, b, 0, c, mask)
    for i in range(RANGE):
        n = part * RANGE + i
        live = mask & (n < N)
        d = tl.zeros((BLOCK,), tl.float32)
        if grad_added is not None:
            d += _row(grad_added, b, n, c, live)
        if grad_h is not None:
            line = b * N + n
            mean = tl.load(stats + line * 2, mask=n < N, other=0.0)
            rstd = tl.load(stats + line * 2 + 1, mask=n < N, other=0.0)
            up = _row(grad_h, b, n, c, live)
            unit = tl.where(live, (_row(added, b, n, c, live) - mean) * rstd, 0.0)
            dshift += up
            if SCALES:
                gain = 1.0 + _vector(scale, scale_row, b, n, c, live)
                if dscales is not None:
                    tl.store(dscales + line * C + c, up * unit, mask=live)
            else:
                dscale += up * unit
            g = up * gain
            d += rstd * (g - tl.sum(g, 0) / C - unit * (tl.sum(g * unit, 0) / C))
        if NEED_GATE:
            product = tl.where(live, d, 0.0) * _row(y, b, n, c, live)
            if GATES:
                tl.store(dgates + (b * N + n) * C + c, product, mask=live)
            else:
                dgate += product
        if dx is not None:
            tl.store(dx + (b * N + n) * C + c, d.to(dx.dtype.element_ty), mask=live)
        if dy is not None:
            e = d
            if gate is not None:
                if GATES:
                    factor = _vector(gate, gate_row, b, n, c, live)
                e = d * factor
            tl.store(dy + (b * N + n) * C + c, e.to(dy.dtype.element_ty), mask=live)
    if partial is not None:
        out = partial + pid * 3 * C + c
        tl.store(out, dgate, mask=mask)
        tl.store(out + C, dshift, mask=mask)
        tl.store(out + 2 * C, dscale, mask=mask)


def _tokens(t: Any) -> tuple[Any, ...] | None:
    return None if t is None else (t, t.stride(0), t.stride(1))


def _strided(v: Any) -> tuple[Any, int, int] | None:
    return None if v is None else (v, *(v.stride(i) if v.shape[i] > 1 else 0 for i in (0, 1)))


def _each(v: Any) -> bool:
    """Whether there is a vector a token."""
    return v is not None and v.shape[1] != 1


def _warps(channels: int) -> int:
    return 4 if channels <= 1024 else 8


def launch_modulate(
    x: Any, y: Any, gate: Any, gate_row: Any, shift: Any, shift_row: Any, scale: Any, scale_row: Any, eps: float
) -> tuple[Any, Any, Any]:
    """Arguments of `modulate` -> (added, h, stats)."""
    batch, n, c = x.shape
    norm = shift is not None
    added = None if y is None else x.new_empty(x.shape)
    h = x.new_empty(x.shape) if norm else None
    stats = x.new_empty((batch, n, 2) if norm else (0,), dtype=dtype(x, "float32"))
    launch(
        _forward_kernel, batch * n, x, _tokens(x), _tokens(y), _strided(gate), gate_row, _strided(shift), shift_row,
        _strided(scale), scale_row, added, h, stats, n, c, eps, BLOCK=next_power(c), num_warps=_warps(c),
    )  # fmt: skip
    empty = (0,)
    return x.new_empty(empty) if added is None else added, x.new_empty(empty) if h is None else h, stats


def backward(
    grad_added: Any, grad_h: Any, added: Any, y: Any, gate: Any, gate_row: Any, scale: Any, scale_row: Any, stats: Any,
    need_x: bool, need_y: bool, need_gate: bool, need_modulation: bool,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """dx, dy (None where not needed), the partial sums ``[B, ranges, 3, C]``, and dgate, dscale of vectors a token."""
    batch, n, c = added.shape
    dx, dy = (added.new_empty(added.shape) if need else None for need in (need_x, need_y))
    ranges = cdiv(n, RANGE)
    sums = need_gate or need_modulation
    wide = dtype(added, "float32")
    partial = added.new_empty((batch, ranges, 3, c), dtype=wide) if sums else None
    gates, scales = _each(gate), _each(scale)
    dgates = added.new_empty(added.shape, dtype=wide) if gates and need_gate else None
    dscales = added.new_empty(added.shape, dtype=wide) if scales and need_modulation else None
    launch(
        _backward_kernel, batch * ranges, added, _tokens(grad_added), _tokens(grad_h), _tokens(added), _tokens(y),
        _strided(gate), gate_row, _strided(scale), scale_row, stats, dx, dy, partial, dgates, dscales, n, c, ranges,
        NEED_GATE=need_gate, GATES=gates, SCALES=scales, RANGE=RANGE, BLOCK=next_power(c), num_warps=_warps(c),
    )  # fmt: skip
    return dx, dy, partial, dgates, dscales


def launch_modulate_backward(
    grad_added: Any, grad_h: Any, added: Any, y: Any, gate: Any, gate_row: Any, scale: Any, scale_row: Any, stats: Any,
    need_x: bool, need_y: bool, need_gate: bool, need_modulation: bool,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Arguments of `modulate_backward` -> (dx, dy, dgate, dshift, dscale)."""
    dx, dy, partial, dgates, dscales = backward(
        grad_added, grad_h, added, y, gate, gate_row, scale, scale_row, stats, need_x, need_y, need_gate,
        need_modulation,
    )  # fmt: skip
    empty = added.new_empty((0,))
    none = added.new_empty((0,), dtype=dtype(added, "float32"))
    total = [none] * 3 if partial is None else list(partial.sum(1, keepdim=True).unbind(2))
    needs = (need_gate, need_modulation, need_modulation)
    dgate, dshift, dscale = ((t if need else none).clone() for t, need in zip(total, needs, strict=True))
    dgate, dscale = dgate if dgates is None else dgates, dscale if dscales is None else dscales
    return empty if dx is None else dx, empty.clone() if dy is None else dy, dgate, dshift, dscale


def aot_cases() -> list[AotCase]:
    """PixArt's 1152 channels: residual and adaptive LayerNorm in one, also with a vector a token, and 4096 in fp32."""

    def case(kind: str, c: int, tokens: int = 1) -> Any:
        x, vector, row = Meta((2, 4096, c), kind), Meta((2, tokens, c), kind), Meta((c,), "float32")

        def run() -> None:
            launch_modulate(x, x, vector, row, vector, row, vector, row, 1e-6)
            stats = Meta((2, 4096, 2), "float32")
            backward(x, x, x, x, vector, row, vector, row, stats, True, True, True, True)

        return run

    return [
        AotCase("bf16-both", case("bfloat16", 1152)),
        AotCase("bf16-tokens", case("bfloat16", 1152, 4096)),
        AotCase("fp32-both-c4096", case("float32", 4096)),
    ]
