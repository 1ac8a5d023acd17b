"""interval_conv2d on a GPU as an implicit matrix product: W's tile is read once for conv(c, W) and conv(r, |W|).

Forward: [positions of the whole batch] x [channels of a group], over taps and input channels. Gradient of the input:
the same over taps and output channels, gathering the outputs a tap reaches. Gradient of W: [channels] x [input
channels] of one tap, over all positions. The tap loop is outside: a tile is one shifted window, its index arithmetic
short.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, cdiv, launch
from ..common import dtype as dtype_named
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
)  # fmt: skip


@triton.jit
def _forward_kernel(
    i_a, i_b, i_w, i_bias, o_x, o_y, positions, out_h, out_w, in_h, in_w, channels, out_channels, eta, grow,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    DY: tl.constexpr, DX: tl.constexpr, group_in, group_out,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr, SOUND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(group_out, BLOCK_O)
    groups = out_channels // group_out
    p = (pid // (blocks * groups)).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = pid // blocks % groups
    o = pid % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    p_mask, o_mask = p < positions, o < group_out
    n, y, x = p // (out_h * out_w), p // out_w % out_h, p % out_w
    m = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    r = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tap in range(KH * KW):
        iy, ix = y * SY - PY + tap // KW * DY, x * SX - PX + tap % KW * DX
        inside = p_mask & (iy >= 0) & (iy < in_h) & (ix >= 0) & (ix < in_w)
        from_p = (n * channels + group * group_in) * in_h * in_w + iy * in_w + ix
        for start in range(0, group_in, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            mask = inside[:, None] & (i[None, :] < group_in)
            at = from_p[:, None] + i[None, :].to(tl.int64) * in_h * in_w
            a, b = tl.load(i_a + at, mask=mask, other=0.0), tl.load(i_b + at, mask=mask, other=0.0)
            w = tl.load(
                i_w + ((group * group_out + o[None, :]) * group_in + i[:, None]) * (KH * KW) + tap,
                mask=o_mask[None, :] & (i[:, None] < group_in),
                other=0.0,
            )  # [BLOCK_I, BLOCK_O]
            if SOUND:
                c, q = centered_sound(a, b, eta, BOUNDS_IN)
            else:
                c, q = centered(a, b, BOUNDS_IN)
            m = dot(c, w, m, a, MODE, EMULATED)
            r = radius_dot(q, w, r, a, MODE, EMULATED, SOUND)
    if i_bias is not None:
        m += tl.load(i_bias + group * group_out + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    low, high = finished(m, r, grow, BOUNDS_OUT, RELU, SOUND)
    at = ((n * out_channels + group * group_out)[:, None] + o[None, :]) * (out_h * out_w) + (y * out_w + x)[:, None]
    mask = p_mask[:, None] & o_mask[None, :]
    tl.store(o_x + at, low.to(o_x.dtype.element_ty), mask=mask)
    tl.store(o_y + at, high.to(o_y.dtype.element_ty), mask=mask)


@triton.jit
def _input_kernel(
    i_ga, i_gb, i_oa, i_ob, i_w, o_a, o_b, positions, out_h, out_w, in_h, in_w, channels, out_channels,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    DY: tl.constexpr, DX: tl.constexpr, group_in, group_out,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(group_in, BLOCK_I)
    groups = channels // group_in
    p = (pid // (blocks * groups)).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = pid // blocks % groups
    i = pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    p_mask, i_mask = p < positions, i < group_in
    n, iy, ix = p // (in_h * in_w), p // in_w % in_h, p % in_w
    m = tl.zeros((BLOCK_P, BLOCK_I), tl.float32)
    r = tl.zeros((BLOCK_P, BLOCK_I), tl.float32)
    for tap in range(KH * KW):
        # the output whose tap this input is, if the stride hits one
        ty, tx = iy + PY - tap // KW * DY, ix + PX - tap % KW * DX
        y, x = ty // SY, tx // SX
        inside = p_mask & (ty >= 0) & (tx >= 0) & (ty % SY == 0) & (tx % SX == 0) & (y < out_h) & (x < out_w)
        from_p = (n * out_channels + group * group_out) * out_h * out_w + y * out_w + x
        for start in range(0, group_out, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            mask = inside[:, None] & (o[None, :] < group_out)
            at = from_p[:, None] + o[None, :].to(tl.int64) * out_h * out_w
            ga, gb = tl.load(i_ga + at, mask=mask, other=0.0), tl.load(i_gb + at, mask=mask, other=0.0)
            oa, ob = ga, gb
            if RELU:
                oa, ob = tl.load(i_oa + at, mask=mask, other=0.0), tl.load(i_ob + at, mask=mask, other=0.0)
            w = tl.load(
                i_w + ((group * group_out + o[:, None]) * group_in + i[None, :]) * (KH * KW) + tap,
                mask=(o[:, None] < group_out) & i_mask[None, :],
                other=0.0,
            )  # [BLOCK_O, BLOCK_I]
            gm, gr = through(ga, gb, oa, ob, BOUNDS_OUT, RELU)
            m = dot(gm, w, m, ga, MODE, EMULATED)
            r = dot(gr, tl.abs(w), r, ga, MODE, EMULATED)
    if BOUNDS_IN:
        m, r = (m - r) * 0.5, (m + r) * 0.5
    at = ((n * channels + group * group_in)[:, None] + i[None, :]) * (in_h * in_w) + (iy * in_w + ix)[:, None]
    mask = p_mask[:, None] & i_mask[None, :]
    tl.store(o_a + at, m.to(o_a.dtype.element_ty), mask=mask)
    tl.store(o_b + at, r.to(o_b.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    i_ga, i_gb, i_oa, i_ob, i_a, i_b, i_w, o_w, positions, out_h, out_w, in_h, in_w, channels, out_channels,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    DY: tl.constexpr, DX: tl.constexpr, group_in, group_out,
    BOUNDS_IN: tl.constexpr, BOUNDS_OUT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, MODE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    pid, blocks, taps = tl.program_id(0), tl.cdiv(group_in, BLOCK_I), KH * KW
    tap, tile = pid % taps, pid // taps
    o_blocks = tl.cdiv(group_out, BLOCK_O)
    i, rest = tile % blocks * BLOCK_I + tl.arange(0, BLOCK_I), tile // blocks
    o, group = rest % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O), rest // o_blocks
    i_mask, o_mask = i < group_in, o < group_out
    m = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    r = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = tl.arange(0, BLOCK_P).to(tl.int64) + start
        p_mask = p < positions
        n, y, x = p // (out_h * out_w), p // out_w % out_h, p % out_w
        at = ((n * out_channels + group * group_out)[None, :] + o[:, None]) * (out_h * out_w)
        at += (y * out_w + x)[None, :]
        mask = o_mask[:, None] & p_mask[None, :]
        ga, gb = tl.load(i_ga + at, mask=mask, other=0.0), tl.load(i_gb + at, mask=mask, other=0.0)
        oa, ob = ga, gb
        if RELU:
            oa, ob = tl.load(i_oa + at, mask=mask, other=0.0), tl.load(i_ob + at, mask=mask, other=0.0)
        gm, gr = through(ga, gb, oa, ob, BOUNDS_OUT, RELU)  # [BLOCK_O, BLOCK_P]
        iy, ix = y * SY - PY + tap // KW * DY, x * SX - PX + tap % KW * DX
        inside = p_mask & (iy >= 0) & (iy < in_h) & (ix >= 0) & (ix < in_w)
        at = ((n * channels + group * group_in)[:, None] + i[None, :]) * (in_h * in_w) + (iy * in_w + ix)[:, None]
        mask = inside[:, None] & i_mask[None, :]
        a, b = tl.load(i_a + at, mask=mask, other=0.0), tl.load(i_b + at, mask=mask, other=0.0)
        c, q = centered(a, b, BOUNDS_IN)
        m = dot(gm, c, m, a, MODE, EMULATED)
        r = dot(gr, q, r, a, MODE, EMULATED)
    at = ((group * group_out + o[:, None]).to(tl.int64) * group_in + i[None, :]) * taps + tap
    mask = o_mask[:, None] & i_mask[None, :]
    w = tl.load(i_w + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_w + at, (m + turned(w, r)).to(o_w.dtype.element_ty), mask=mask)


def config(mode: str, depth: str) -> dict[str, Any]:
    """Tile sizes; ``depth`` names the contraction, which is short where float32 operands stand in registers."""
    wide, split = mode == "fp32", mode == "bf16x3+bf16" and depth == "P"
    sizes = {"BLOCK_P": 64, "BLOCK_O": 32 if wide else 64, "BLOCK_I": 32 if wide or split else 64}
    sizes["BLOCK_" + depth] = 32 if mode == "storage" else 16
    return {**sizes, "num_warps": 8}


def _options(a: Any, weight: Any, conv: Any, depth: str, compute: str, sound: bool = False) -> dict[str, Any]:
    chosen = mode(a, compute, sound)
    (sy, sx), (py, px), (dy, dx) = conv.stride, conv.padding, conv.dilation
    taps = {"KH": weight.shape[2], "KW": weight.shape[3], "SY": sy, "SX": sx, "PY": py, "PX": px, "DY": dy, "DX": dx}
    return {**taps, **config(chosen["MODE"], depth), **chosen}


def _sizes(a: Any, weight: Any, conv: Any) -> tuple[int, int]:
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    height, width = (
        (a.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return height, width


def launch_interval_conv2d(
    a: Any, b: Any, weight: Any, bias: Any, conv: Any, bounds_in: bool, bounds_out: bool, relu: bool, compute: str,
    sound: bool, spread: float = 0.0,
) -> tuple[Any, Any]:  # fmt: skip
    """Arguments of `interval_conv2d` -> two ``[B, O, H', W']``."""
    if sound and spread > 0:
        wide = (*spread_box(a, b, bounds_in, spread), weight.float(), None if bias is None else bias.float())
        x, y = launch_interval_conv2d(*wide, conv, bounds_in, True, False, compute, True)
        x, y = spread_ends(x.movedim(1, -1), y.movedim(1, -1), bias, spread, relu)
        x, y = (t.movedim(-1, 1).contiguous() for t in (x, y))
        return narrow_outward(x, a, True), narrow_outward(y, a, False)
    groups = conv.groups
    (batch, channels, in_h, in_w), out_channels, (out_h, out_w) = a.shape, weight.shape[0], _sizes(a, weight, conv)
    options, group_out = _options(a, weight, conv, "I", compute, sound), out_channels // groups
    kind = dtype_named(a, "float32") if sound else a.dtype
    x, y = (a.new_empty((batch, out_channels, out_h, out_w), dtype=kind) for _ in range(2))
    positions = batch * out_h * out_w
    programs = cdiv(positions, options["BLOCK_P"]) * cdiv(group_out, options["BLOCK_O"]) * groups
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3] + 8
    launch(
        _forward_kernel, programs, a, a, b, weight, bias, x, y, positions, out_h, out_w, in_h, in_w, channels,
        out_channels, *eta_and_grow(terms, compute), group_in=channels // groups, group_out=group_out,
        BOUNDS_IN=bounds_in, BOUNDS_OUT=bounds_out, RELU=relu, SOUND=sound, **options,
    )  # fmt: skip
    return (narrow_outward(x, a, True), narrow_outward(y, a, False)) if sound else (x, y)


def launch_interval_conv2d_backward(
    grad_a: Any, grad_b: Any, a: Any, b: Any, weight: Any, out_a: Any, out_b: Any, conv: Any, bounds_in: bool,
    bounds_out: bool, relu: bool, compute: str, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Arguments of `interval_conv2d_backward` -> (da, db, dweight, dbias), of shape [0] where not wanted."""
    groups = conv.groups
    (batch, channels, in_h, in_w), out_channels, (out_h, out_w) = a.shape, weight.shape[0], _sizes(a, weight, conv)
    group_in, group_out = channels // groups, out_channels // groups
    sizes = (out_h, out_w, in_h, in_w, channels, out_channels)
    flags = {"group_in": group_in, "group_out": group_out, "BOUNDS_IN": bounds_in, "BOUNDS_OUT": bounds_out}
    da, db = (a.new_empty(tuple(a.shape) if need_x else (0,)) for _ in range(2))
    dweight, dbias = a.new_empty(tuple(weight.shape) if need_weight else (0,)), a.new_empty((0,))
    ga, gb, oa, ob = given = (grad_a, grad_b, out_a, out_b)
    if need_x:
        options, positions = _options(a, weight, conv, "O", compute), batch * in_h * in_w
        programs = cdiv(positions, options["BLOCK_P"]) * cdiv(group_in, options["BLOCK_I"]) * groups
        launch(_input_kernel, programs, a, *given, weight, da, db, positions, *sizes, RELU=relu, **flags, **options)
    if need_weight:
        options, positions = _options(a, weight, conv, "P", compute), batch * out_h * out_w
        tiles = cdiv(group_out, options["BLOCK_O"]) * cdiv(group_in, options["BLOCK_I"]) * groups
        programs = tiles * weight.shape[2] * weight.shape[3]
        launch(
            _weight_kernel, programs, a, *given, a, b, weight, dweight, positions, *sizes, RELU=relu, **flags, **options
        )
    if need_bias:
        if relu:
            ga, gb = ga * (oa > 0), gb * (ob > 0)
        dbias = ((ga.float() + gb.float()) if bounds_out else ga.float()).sum((0, 2, 3)).to(a.dtype)
    return da, db, dweight, dbias


def aot_cases() -> list[AotCase]:
    """A hidden layer and a strided one of CNN7, forward and backward; a sound forward; every mode of ``compute``."""

    def case(kind: str, channels: int, out_channels: int, stride: int, compute: str = "fp32") -> None:
        conv = Group(stride=(stride, stride), padding=(1, 1), dilation=(1, 1), groups=1)
        options = (True, True, True, compute)
        size = 32 // stride
        a, weight = Meta((128, channels, 32, 32), kind), Meta((out_channels, channels, 3, 3), kind)
        out = Meta((128, out_channels, size, size), kind)
        launch_interval_conv2d(a, a, weight, Meta((out_channels,), kind), conv, *options, False)
        launch_interval_conv2d_backward(out, out, a, a, weight, out, out, conv, *options, True, True, False)

    def sound(compute: str) -> None:
        a, weight = Meta((128, 64, 32, 32), "float32"), Meta((64, 64, 3, 3), "float32")
        conv = Group(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
        launch_interval_conv2d(a, a, weight, None, conv, True, True, True, compute, True)

    units = ("tf32", "bf16x3+bf16", "bf16")
    return [
        AotCase("fp32-64-64", lambda: case("float32", 64, 64, 1)),
        AotCase("bf16-64-128-s2", lambda: case("bfloat16", 64, 128, 2)),
        *(AotCase(f"{m}-64-64", lambda m=m: case("float32", 64, 64, 1, m)) for m in units),
        *(AotCase(f"{m}-sound", lambda m=m: sound(m)) for m in ("fp32", *units)),
    ]
