"""s4d_step on a GPU: a program takes ROWS (sample, feature) pairs and reads and writes their states once.

Floor: 16 B H M bytes.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power, refuse_double

#: States of a program, over all its rows.
ELEMENTS = 512


@triton.jit
def _pair(t, at, inside):
    """Complex numbers in float32."""
    re, im = tl.load(t + at, mask=inside, other=0.0), tl.load(t + at + 1, mask=inside, other=0.0)
    return re.to(tl.float32), im.to(tl.float32)


@triton.jit
def _step_kernel(u, a, b, c, d, state, y, after, rows, H, M, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    h = row % H
    x = tl.load(u + row, mask=live, other=0.0).to(tl.float32)
    total = tl.load(d + h, mask=live, other=0.0).to(tl.float32) * x
    for n0 in range(0, M, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        inside = live[:, None] & (n[None, :] < M)
        own, shared = (row[:, None] * M + n[None, :]) * 2, (h[:, None] * M + n[None, :]) * 2
        xr, xi = _pair(state, own, inside)
        ar, ai = _pair(a, shared, inside)
        br, bi = _pair(b, shared, inside)
        cr, ci = _pair(c, shared, inside)
        re = ar * xr - ai * xi + br * x[:, None]
        im = ar * xi + ai * xr + bi * x[:, None]
        tl.store(after + own, re, mask=inside)
        tl.store(after + own + 1, im, mask=inside)
        total += 2.0 * tl.sum(cr * re - ci * im, 1)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=live)


def supports_s4d_step(u: Any, a: Any, b: Any, c: Any, d: Any, state: Any) -> str | None:
    """The reason this kernel cannot serve a call, or None."""
    return refuse_double(u, state)


def launch_s4d_step(u: Any, a: Any, b: Any, c: Any, d: Any, state: Any) -> tuple[Any, Any]:
    """Arguments of `s4d_step` -> (y, after)."""
    rows, states = u.shape[0] * u.shape[1], a.shape[1]
    y, after = u.new_empty(u.shape), state.new_empty(state.shape, dtype=dtype(u, "float32"))
    block = min(next_power(states), 64)
    each = ELEMENTS // block
    launch(
        _step_kernel, cdiv(rows, each), u, u, a, b, c, d, state, y, after, rows, u.shape[1], states, ROWS=each,
        BLOCK=block,
    )  # fmt: skip
    return y, after


def aot_cases() -> list[AotCase]:
    """A batch of 64 in float32 and bfloat16, few and many states."""

    def run(kind: str, states: int) -> None:
        pair = Meta((1024, states, 2), "float32")
        launch_s4d_step(
            Meta((64, 1024), kind), pair, pair, pair, Meta((1024,), "float32"), Meta((64, 1024, states, 2), "float32")
        )

    return [
        AotCase("fp32-M32", lambda: run("float32", 32)),
        AotCase("bf16-M32", lambda: run("bfloat16", 32)),
        AotCase("fp32-M100", lambda: run("float32", 100)),
    ]
