"""Compression of keys and values: a_mc = b_c + sum_t w_ct z_token(m, t),c, then LayerNorm over the C channels.

Forward: one program an output row, the whole row in registers; x is read once. Backward: one program a row makes da
through the LayerNorm (float32 [B, M, G, C]; without LayerNorm da is the gradient as it came), then one program a block
of channels and a range of rows writes dx and sums dw, db, dgain, doffset; ranges are added in order afterwards: no
atomics.
Floor: k and v read and k', v' written once; backward x read, dx written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, cdiv, dtype, launch, next_power

BLOCK_C = 128
#: Rows whose parameter sums one program makes.
RANGE = 64


@triton.jit
def token_of(m, tap, ratio, width, across, STRIDE: tl.constexpr):
    """Token of a tap of output m."""
    if STRIDE:  # one return: Triton 3.6 takes the type of both branches
        token = m * ratio
    else:
        token = ((m // across) * ratio + tap // ratio) * width + (m % across) * ratio + tap % ratio
    return token


@triton.jit
def _sum_taps(x, z_base, weight, w_base, bias, b_base, m, c, mask, grid, factor, T, STRIDE: tl.constexpr):
    """a of one row, float32 [len(c)]."""
    a = tl.zeros_like(c).to(tl.float32)
    for t in range(T):
        n = token_of(m, t, grid[0], grid[1], grid[2], STRIDE)
        z = tl.load(z_base + n * x[2] + c, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            z *= tl.load(weight + w_base + c * T + t, mask=mask, other=0.0).to(tl.float32)
        a += z
    if weight is None:
        a *= factor
    if bias is not None:
        a += tl.load(bias + b_base + c, mask=mask, other=0.0).to(tl.float32)
    return a


@triton.jit
def _forward_kernel(
    x, first, weight, weight_step, bias, bias_step, gain, offset, kv, stats, M, C, T, G, grid, factor, eps,
    STRIDE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x is (tensor, batch, token, slot strides); grid is (ratio, width, windows across)."""
    pid = tl.program_id(0).to(tl.int64)
    g, m, b = pid % G, pid // G % M, pid // G // M
    c = tl.arange(0, BLOCK)
    mask = c < C
    z_base = x[0] + b * x[1] + (first + g) * x[3]
    a = _sum_taps(x, z_base, weight, g * weight_step, bias, g * bias_step, m, c, mask, grid, factor, T, STRIDE)
    if NORM:
        mean = tl.sum(tl.where(mask, a, 0.0), 0) / C
        a = tl.where(mask, a - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a, 0) / C + eps)
        tl.store(stats + pid * 2, mean)
        tl.store(stats + pid * 2 + 1, rstd)
        a *= rstd
        if gain is not None:
            a *= tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
        if offset is not None:
            a += tl.load(offset + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(kv + pid * C + c, a.to(kv.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    grad, x, first, weight, weight_step, bias, bias_step, gain, stats, da, M, C, T, G, grid, factor,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """da = (g - mean g - unit mean(g unit)) / s of one row, g = grad gain."""
    pid = tl.program_id(0).to(tl.int64)
    g, m, b = pid % G, pid // G % M, pid // G // M
    c = tl.arange(0, BLOCK)
    mask = c < C
    z_base = x[0] + b * x[1] + (first + g) * x[3]
    a = _sum_taps(x, z_base, weight, g * weight_step, bias, g * bias_step, m, c, mask, grid, factor, T, STRIDE)
    mean, rstd = tl.load(stats + pid * 2), tl.load(stats + pid * 2 + 1)
    unit = tl.where(mask, (a - mean) * rstd, 0.0)
    up = tl.load(grad[0] + b * grad[1] + m * grad[2] + g * grad[3] + c, mask=mask, other=0.0).to(tl.float32)
    if gain is not None:
        up *= tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
    inner = up - tl.sum(up, 0) / C - unit * (tl.sum(up * unit, 0) / C)
    tl.store(da + pid * C + c, rstd * inner, mask=mask)


@triton.jit
def _spread_kernel(
    grad, da, x, first, weight, weight_step, bias, bias_step, stats, dx, partial, rows, M, C, T, G, blocks, grid,
    factor,
    STRIDE: tl.constexpr, NORM: tl.constexpr, RANGE: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a range of rows and a block of channels of one slot, and partial [ranges, G, T + 3, C]: dw, db, dgain,
    doffset."""
    pid = tl.program_id(0).to(tl.int64)
    block, g, part = pid % blocks, pid // blocks % G, pid // blocks // G
    c = block * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    t = tl.arange(0, TAPS)
    both = (t < T)[:, None] & mask[None, :]
    if weight is not None:
        w = tl.load(weight + g * weight_step + c[None, :] * T + t[:, None], mask=both, other=0.0).to(tl.float32)
    else:
        w = tl.where(both, factor, 0.0)
    add = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        add += tl.load(bias + g * bias_step + c, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((TAPS, BLOCK), tl.float32)
    db, dgain, doffset = add * 0.0, add * 0.0, add * 0.0
    for i in range(RANGE):
        row = part * RANGE + i
        inside = row < rows
        b, m = row // M, row % M
        line = row * G + g
        live = mask & inside
        tokens = token_of(m, t, grid[0], grid[1], grid[2], STRIDE)
        all_live = both & inside
        d = tl.load(da[0] + b * da[1] + m * da[2] + g * da[3] + c, mask=live, other=0.0).to(tl.float32)
        if partial is not None:
            at = x[0] + b * x[1] + (first + g) * x[3]
            z = tl.load(at + tokens[:, None] * x[2] + c[None, :], mask=all_live, other=0.0).to(tl.float32)
            dw += z * d[None, :]
            db += d
            if NORM:
                mean = tl.load(stats + line * 2, mask=inside, other=0.0)
                rstd = tl.load(stats + line * 2 + 1, mask=inside, other=0.0)
                at_grad = grad[0] + b * grad[1] + m * grad[2] + g * grad[3]
                up = tl.load(at_grad + c, mask=live, other=0.0).to(tl.float32)
                dgain += up * (tl.sum(z * w, 0) + add - mean) * rstd
                doffset += up
        if dx is not None:
            out = dx[0] + b * dx[1] + (first + g) * dx[3]
            value = (w * d[None, :]).to(dx[0].dtype.element_ty)
            tl.store(out + tokens[:, None] * dx[2] + c[None, :], value, mask=all_live)
    if partial is not None:
        out = partial + (part * G + g) * (T + 3) * C + c
        tl.store(out[None, :] + t[:, None] * C, dw, mask=both)
        tl.store(out + T * C, db, mask=mask)
        tl.store(out + (T + 1) * C, dgain, mask=mask)
        tl.store(out + (T + 2) * C, doffset, mask=mask)


def _warps(channels: int) -> int:
    return 4 if channels <= 2048 else 8


def _places(t: Any) -> tuple[Any, ...]:
    """(tensor, batch, token, slot strides) of [B, tokens, slots, C]."""
    return (t, t.stride(0), t.stride(1), t.stride(2))


def _plan(x: Any, first: int, given: Any) -> dict[str, Any]:
    """What the kernels share: sizes, the grid and the parameters' steps from k to v."""
    height, width, ratio, mode, weight, bias = (
        given.height, given.width, given.ratio, given.mode, given.weight, given.bias
    )
    sums = mode in ("conv", "mean")
    taps = ratio * ratio if sums else 1
    count = cdiv(height * width, ratio) if mode == "stride" else (height // ratio) * (width // ratio)
    c = x.shape[3]
    return {
        "taps": (weight, c * taps if weight is not None and weight.shape[0] > 1 else 0,
                 bias, c if bias is not None and bias.shape[0] > 1 else 0),
        "M": count,
        "T": taps,
        "G": x.shape[2] - first,
        "grid": (ratio, width, max(width // ratio, 1)),
        "factor": 1.0 / taps if mode == "mean" else 1.0,
        "STRIDE": mode == "stride",
        "covered": sums and height % ratio == 0 and width % ratio == 0,
    }


def launch_kv_compress(x: Any, first: int, given: Any, eps: float) -> tuple[Any, Any]:
    """Arguments of `kv_compress` -> (kv, stats)."""
    p, normalize = _plan(x, first, given), given.normalize
    batch, c = x.shape[0], x.shape[3]
    kv = x.new_empty((batch, p["M"], p["G"], c))
    stats = x.new_empty((batch, p["M"], p["G"], 2) if normalize else (0,), dtype=dtype(x, "float32"))
    launch(
        _forward_kernel, batch * p["M"] * p["G"], x, _places(x), first, *p["taps"], given.norm_weight,
        given.norm_bias, kv, stats, p["M"], c, p["T"], p["G"], p["grid"], p["factor"], eps, STRIDE=p["STRIDE"],
        NORM=normalize, BLOCK=next_power(c), num_warps=_warps(c),
    )  # fmt: skip
    return kv, stats


def spread(
    grad: Any, x: Any, first: int, p: dict[str, Any], normalize: bool, norm_weight: Any, stats: Any, dx: Any,
    need_params: bool,
) -> Any:  # fmt: skip
    """Write dx (unless None) and return the partial sums ``[ranges, G, T + 3, C]`` (None unless needed)."""
    batch, c = x.shape[0], x.shape[3]
    rows = batch * p["M"]
    common = (p["M"], c, p["T"], p["G"])
    f32 = dtype(x, "float32")
    da = grad
    if normalize:
        da = x.new_empty((batch, p["M"], p["G"], c), dtype=f32)
        launch(
            _norm_kernel, rows * p["G"], x, _places(grad), _places(x), first, *p["taps"], norm_weight, stats, da,
            *common, p["grid"], p["factor"], STRIDE=p["STRIDE"], BLOCK=next_power(c), num_warps=_warps(c),
        )  # fmt: skip
    ranges, blocks = cdiv(rows, RANGE), cdiv(c, BLOCK_C)
    partial = x.new_empty((ranges, p["G"], p["T"] + 3, c), dtype=f32) if need_params else None
    launch(
        _spread_kernel, ranges * blocks * p["G"], x, _places(grad), _places(da), _places(x), first, *p["taps"], stats,
        None if dx is None else _places(dx), partial, rows, *common, blocks, p["grid"], p["factor"],
        STRIDE=p["STRIDE"], NORM=normalize, RANGE=RANGE, TAPS=next_power(p["T"]), BLOCK=BLOCK_C,
    )  # fmt: skip
    return partial


def parameters(partial: Any, p: dict[str, Any], given: Any, like: Any) -> list[Any]:
    """dweight, dbias, dnorm_weight, dnorm_bias of the partial sums; ``[0]`` where there are none."""
    empty = like.new_empty((0,), dtype=dtype(like, "float32"))
    if partial is None:
        return [empty, empty.clone(), empty.clone(), empty.clone()]
    weight, bias, total, taps = given.weight, given.bias, partial.sum(0), p["T"]  # [G, T + 3, C]
    one = total.sum(0, keepdim=True)
    dw = db = dgain = doffset = empty
    if weight is not None:
        dw = (total if weight.shape[0] > 1 else one)[:, :taps].transpose(1, 2).reshape(weight.shape)
    if bias is not None:
        db = (total if bias.shape[0] > 1 else one)[:, taps]
    if given.normalize and given.norm_weight is not None:
        dgain = one[0, taps + 1]
    if given.normalize and given.norm_bias is not None:
        doffset = one[0, taps + 2]
    return [t.clone() for t in (dw, db, dgain, doffset)]


def backward_into(grad: Any, x: Any, first: int, given: Any, stats: Any, dx: Any, need_params: bool) -> list[Any]:
    """Write dx's compressed slots (unless None; where tokens have no window dx must be 0 already), return the
    parameters' gradients."""
    p = _plan(x, first, given)
    partial = spread(grad, x, first, p, given.normalize, given.norm_weight, stats, dx, need_params)
    return parameters(partial, p, given, x)


def fresh(x: Any, first: int, given: Any) -> Any:
    """A tensor for dx, 0 wherever the kernels write nothing."""
    covered = _plan(x, first, given)["covered"]
    return x.new_empty(x.shape) if covered and first == 0 else x.new_zeros(x.shape)


def launch_kv_compress_backward(
    grad: Any, x: Any, first: int, given: Any, stats: Any, need_x: bool, need_params: bool
) -> tuple[Any, ...]:
    """Arguments of `kv_compress_backward` -> (dx, dweight, dbias, dnorm_weight, dnorm_bias)."""
    dx = fresh(x, first, given) if need_x else None
    params = backward_into(grad, x, first, given, stats, dx, need_params)
    return (x.new_empty((0,)) if dx is None else dx, *params)


def compression_of(height: int, width: int, ratio: int, mode: str, weight: Any, bias: Any, vector: Any) -> Group:
    """A compression for ahead-of-time cases, with a LayerNorm where there is a ``vector`` for it."""
    return Group(
        height=height, width=width, ratio=ratio, mode=mode, weight=weight, bias=bias, normalize=vector is not None,
        norm_weight=vector, norm_bias=vector,
    )


def aot_cases() -> list[AotCase]:
    """PixArt's 1152 channels at ratios 2 and 4 with LayerNorm, and a mean without."""

    def case(kind: str, ratio: int, mode: str) -> Any:
        x = Meta((2, 4096, 3, 1152), kind)
        m = 4096 // ratio**2
        vector = Meta((1152,), "float32")
        weight = Meta((1, 1152, ratio, ratio), "float32") if mode == "conv" else None
        bias = Meta((1, 1152), "float32") if mode == "conv" else None
        norm = mode == "conv"
        given = compression_of(64, 64, ratio, mode, weight, bias, vector if norm else None)

        def run() -> None:
            launch_kv_compress(x, 1, given, 1e-5)
            grad, stats = Meta((2, m, 2, 1152), kind), Meta((2, m, 2, 2), "float32")
            spread(grad, x, 1, _plan(x, 1, given), norm, given.norm_weight, stats, x, True)

        return run

    return [
        AotCase("bf16-conv-r2", case("bfloat16", 2, "conv")),
        AotCase("fp32-conv-r4", case("float32", 4, "conv")),
        AotCase("bf16-mean-r2", case("bfloat16", 2, "mean")),
    ]
