"""interval_linear on a GPU: c W^T + b and r |W|^T from one tile of W, and the gradients in the same way.

Forward: a program owns [BLOCK_B, BLOCK_N] outputs and two accumulators. Gradient of the box: [BLOCK_B, BLOCK_K], over
N. Gradient of W: [BLOCK_N, BLOCK_K], over the batch, Gm^T m + sign(W) o Gr^T r; the programs of the first K block also
sum the bias's. Cost 4, 4 and 4 B N K FLOPs; float32 inputs use float32 multiply-adds unless
``compute`` allows matrix units; 16-bit inputs use those.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, refuse_double
from .dual import (
    centered,
    centered_sound,
    dot,
    eta_and_grow,
    finished,
    mode,
    narrow_outward,
    radius_dot,
    spread_box,
    spread_ends,
    through,
    turned,
)


@triton.jit
def _forward_kernel(
    i_a, i_b, s_a, s_b, i_w, s_w, i_bias, o_x, o_y, batch, n, k, eta, grow,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr, SOUND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    rows = (pid // blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < batch, cols < n
    m = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    r = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (at[None, :] < k)
        a = tl.load(i_a + rows[:, None] * s_a + at[None, :], mask=mask, other=0.0)  # [BLOCK_B, BLOCK_K]
        b = tl.load(i_b + rows[:, None] * s_b + at[None, :], mask=mask, other=0.0)
        w = tl.load(
            i_w + cols[None, :] * s_w + at[:, None], mask=col_mask[None, :] & (at[:, None] < k), other=0.0
        )  # [BLOCK_K, BLOCK_N]
        if SOUND:
            c, q = centered_sound(a, b, eta, BOUNDS_IN)
        else:
            c, q = centered(a, b, BOUNDS_IN)
        m = dot(c, w, m, a, MODE, EMULATED)
        r = radius_dot(q, w, r, a, MODE, EMULATED, SOUND)
    if i_bias is not None:
        m += tl.load(i_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    x, y = finished(m, r, grow, BOUNDS_OUT, RELU, SOUND)
    at, mask = rows[:, None] * n + cols[None, :], row_mask[:, None] & col_mask[None, :]
    tl.store(o_x + at, x.to(o_x.dtype.element_ty), mask=mask)
    tl.store(o_y + at, y.to(o_y.dtype.element_ty), mask=mask)


@triton.jit
def _input_kernel(
    i_ga, i_gb, i_oa, i_ob, i_w, s_w, o_a, o_b, batch, n, k,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(k, BLOCK_K)
    rows = (pid // blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, col_mask = rows < batch, cols < k
    m = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    r = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in range(0, n, BLOCK_N):
        out = start + tl.arange(0, BLOCK_N)
        at, mask = rows[:, None] * n + out[None, :], row_mask[:, None] & (out[None, :] < n)
        ga, gb = tl.load(i_ga + at, mask=mask, other=0.0), tl.load(i_gb + at, mask=mask, other=0.0)
        oa, ob = ga, gb
        if RELU:
            oa, ob = tl.load(i_oa + at, mask=mask, other=0.0), tl.load(i_ob + at, mask=mask, other=0.0)
        w = tl.load(
            i_w + out[:, None].to(tl.int64) * s_w + cols[None, :],
            mask=(out[:, None] < n) & col_mask[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        gm, gr = through(ga, gb, oa, ob, BOUNDS_OUT, RELU)
        m = dot(gm, w, m, ga, MODE, EMULATED)
        r = dot(gr, tl.abs(w), r, ga, MODE, EMULATED)
    if BOUNDS_IN:
        m, r = (m - r) * 0.5, (m + r) * 0.5
    at, mask = rows[:, None] * k + cols[None, :], row_mask[:, None] & col_mask[None, :]
    tl.store(o_a + at, m.to(o_a.dtype.element_ty), mask=mask)
    tl.store(o_b + at, r.to(o_b.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    i_ga, i_gb, i_oa, i_ob, i_a, i_b, s_a, s_b, i_w, s_w, o_w, o_bias, batch, n, k,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(k, BLOCK_K)
    outs = (pid // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, col_mask = outs < n, cols < k
    m = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    r = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, batch, BLOCK_B):
        rows = tl.arange(0, BLOCK_B).to(tl.int64) + start
        at, mask = rows[None, :] * n + outs[:, None], (rows[None, :] < batch) & out_mask[:, None]
        ga, gb = tl.load(i_ga + at, mask=mask, other=0.0), tl.load(i_gb + at, mask=mask, other=0.0)
        oa, ob = ga, gb
        if RELU:
            oa, ob = tl.load(i_oa + at, mask=mask, other=0.0), tl.load(i_ob + at, mask=mask, other=0.0)
        gm, gr = through(ga, gb, oa, ob, BOUNDS_OUT, RELU)  # [BLOCK_N, BLOCK_B]
        mask = (rows[:, None] < batch) & col_mask[None, :]
        a = tl.load(i_a + rows[:, None] * s_a + cols[None, :], mask=mask, other=0.0)
        b = tl.load(i_b + rows[:, None] * s_b + cols[None, :], mask=mask, other=0.0)
        c, q = centered(a, b, BOUNDS_IN)
        m = dot(gm, c, m, a, MODE, EMULATED)
        r = dot(gr, q, r, a, MODE, EMULATED)
        total += tl.sum(gm, 1)
    mask = out_mask[:, None] & col_mask[None, :]
    if o_w is not None:
        w = tl.load(i_w + outs[:, None] * s_w + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(o_w + outs[:, None] * k + cols[None, :], (m + turned(w, r)).to(o_w.dtype.element_ty), mask=mask)
    if o_bias is not None:
        tl.store(o_bias + outs, total.to(o_bias.dtype.element_ty), mask=out_mask & (pid % blocks == 0))


def config(batch: int, mode: str, depth: str) -> dict[str, Any]:
    """Tile sizes; ``depth`` names the contraction. Two accumulators a program, so half of what one product would take.

    float32 operands stand in registers on the way to the multiply-adds: deeper or larger tiles spill.
    """
    wide = mode == "fp32"
    sizes = {"BLOCK_B": 32, "BLOCK_N": 64, "BLOCK_K": 64} if wide else {"BLOCK_B": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    sizes["BLOCK_" + depth] = 16 if wide else 64 if mode == "storage" and depth != "B" else 32
    if batch <= 16 and depth != "B":
        sizes["BLOCK_B"] = 16
    return {**sizes, "num_warps": 8}


def _options(a: Any, depth: str, compute: str, sound: bool = False) -> dict[str, Any]:
    chosen = mode(a, compute, sound)
    return {**config(a.shape[0], chosen["MODE"], depth), **chosen}


def launch_interval_linear(
    a: Any, b: Any, weight: Any, bias: Any, bounds_in: bool, bounds_out: bool, relu: bool, compute: str, sound: bool,
    spread: float = 0.0,
) -> tuple[Any, Any]:  # fmt: skip
    """Arguments of `interval_linear` -> two ``[B, N]``."""
    if sound and spread > 0:
        wide = (*spread_box(a, b, bounds_in, spread), weight.float(), None if bias is None else bias.float())
        ends = spread_ends(
            *launch_interval_linear(*wide, bounds_in, True, False, compute, True), bias, spread, relu
        )
        return narrow_outward(ends[0], a, True), narrow_outward(ends[1], a, False)
    (batch, k), n, options = a.shape, weight.shape[0], _options(a, "K", compute, sound)
    kind = dtype(a, "float32") if sound else a.dtype
    x, y = a.new_empty((batch, n), dtype=kind), a.new_empty((batch, n), dtype=kind)
    programs = cdiv(batch, options["BLOCK_B"]) * cdiv(n, options["BLOCK_N"])
    launch(
        _forward_kernel, programs, a, a, b, a.stride(0), b.stride(0), weight, weight.stride(0), bias, x, y, batch, n, k,
        *eta_and_grow(k + 8, compute), BOUNDS_IN=bounds_in, BOUNDS_OUT=bounds_out, RELU=relu, SOUND=sound, **options,
    )  # fmt: skip
    return (narrow_outward(x, a, True), narrow_outward(y, a, False)) if sound else (x, y)


def launch_interval_linear_backward(
    grad_a: Any, grad_b: Any, a: Any, b: Any, weight: Any, out_a: Any, out_b: Any, bounds_in: bool,
    bounds_out: bool, relu: bool, compute: str, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Arguments of `interval_linear_backward` -> (da, db, dweight, dbias), of shape [0] where not wanted."""
    (batch, k), n = a.shape, weight.shape[0]
    flags = {"BOUNDS_IN": bounds_in, "BOUNDS_OUT": bounds_out, "RELU": relu}
    da, db = (a.new_empty((batch, k) if need_x else (0,)) for _ in range(2))
    dweight, dbias = a.new_empty((n, k) if need_weight else (0,)), a.new_empty((n,) if need_bias else (0,))
    given = (grad_a, grad_b, out_a, out_b)
    if need_x:
        options = _options(a, "N", compute)
        programs = cdiv(batch, options["BLOCK_B"]) * cdiv(k, options["BLOCK_K"])
        launch(
            _input_kernel, programs, a, *given, weight, weight.stride(0), da, db, batch, n, k, **flags, **options
        )  # fmt: skip
    if need_weight or need_bias:
        options = _options(a, "B", compute)
        programs = cdiv(n, options["BLOCK_N"]) * (cdiv(k, options["BLOCK_K"]) if need_weight else 1)
        launch(
            _weight_kernel, programs, a, *given, a, b, a.stride(0), b.stride(0), weight, weight.stride(0),
            dweight if need_weight else None, dbias if need_bias else None, batch, n, k if need_weight else 1, **flags,
            **options,
        )  # fmt: skip
    return da, db, dweight, dbias


def supports_interval_linear(a: Any, b: Any, weight: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if weight.shape[0] > 1 and weight.shape[1] > 1 and weight.stride(1) != 1:
        return "a weight stored [K, N] is served by the C++ kernel and by plain PyTorch"
    return refuse_double(a)


def supports_interval_linear_backward(ga: Any, gb: Any, a: Any, b: Any, weight: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return supports_interval_linear(a, b, weight)


def aot_cases() -> list[AotCase]:
    """A hidden layer in float32 and in bfloat16, forward (fast and sound) and backward; every mode of ``compute``."""

    def case(kind: str, batch: int, k: int, n: int, compute: str = "fp32") -> None:
        a, weight, bias, out = Meta((batch, k), kind), Meta((n, k), kind), Meta((n,), kind), Meta((batch, n), kind)
        launch_interval_linear(a, a, weight, bias, True, True, True, compute, False)
        launch_interval_linear_backward(out, out, a, a, weight, out, out, True, True, True, compute, True, True, True)

    def sound(compute: str) -> None:
        a, weight, bias = Meta((128, 784), "float32"), Meta((512, 784), "float32"), Meta((512,), "float32")
        launch_interval_linear(a, a, weight, bias, True, True, True, compute, True)

    units = ("tf32", "bf16x3+bf16", "bf16")
    return [
        AotCase("bf16-b128-k32768-n512", lambda: case("bfloat16", 128, 32768, 512)),
        AotCase("fp32-b128-k784-n512", lambda: case("float32", 128, 784, 512)),
        AotCase("fp32-b1-k2048-n2048", lambda: case("float32", 1, 2048, 2048)),
        *(AotCase(f"{m}-b128-k784-n512", lambda m=m: case("float32", 128, 784, 512, m)) for m in units),
        *(AotCase(f"{m}-sound", lambda m=m: sound(m)) for m in ("fp32", *units)),
    ]
