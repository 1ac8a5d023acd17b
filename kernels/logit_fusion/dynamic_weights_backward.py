"""The gradient of the exact dynamic weights, by the implicit function theorem on F(t) = T.

    P = softmax(z_L + t x),   m = E_P x,   den = F'(t) = t Var_P x,   s = grad_t / den
    dz_L = -s (t P (x - m) - P + p),   dx = -s t^2 P (x - m),   dT = s
    dT_k/dz_k = Q_k (d_k - E_{Q_k} d_k),   dT_k/dz_0 = Q_0 - Q_k

Ray: t = max_k alpha_k, u = alpha / t constant, T = mean T_k; decoupled: one problem an expert. Tiles write partials
twice (the targets, whose centres place the clamp; then the moments under P_t), one program a row merges each time, and
tiles write the gradients. Floor: K + 2 logit tensors read once, their gradients written; three reads here.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch, next_power, refuse_double, row_tile, safe
from .fusion import difference, load_pair, load_row, models_tuple
from .newton import CLAMP
from .partials import tile_max
from .sweep import merge_target, sweep, sweep_width


@triton.jit
def merged(tops, sums, i, tiles):
    """(max, log sum exp) of partials, float64."""
    top_t = tl.load(tops + i, mask=i < tiles, other=-INF)
    sum_t = tl.load(sums + i, mask=i < tiles, other=0.0)
    top = tile_max(top_t)
    return top, tl.log(tl.sum((sum_t * tl.exp(top_t - top)).to(tl.float64), 0)) + top.to(tl.float64)


@triton.jit
def _rows_kernel(tiles, i_targets, o_rows, COUNT: tl.constexpr, TILES: tl.constexpr):
    """Per row and expert: lse_k, lse_0, lse_k - lse_0, KL."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    for k in tl.static_range(COUNT):
        part = i_targets + (row * COUNT + k) * 7 * tiles
        kl, center, _, _ = merge_target(part, tiles, TILES)
        _, lse = merged(part, part + tiles, i, tiles)
        _, lse_anti = merged(part + 3 * tiles, part + 4 * tiles, i, tiles)
        out = o_rows + (row * COUNT + k) * 4
        tl.store(out, lse.to(tl.float32))
        tl.store(out + 1, lse_anti.to(tl.float32))
        tl.store(out + 2, center.to(tl.float32))
        tl.store(out + 3, kl.to(tl.float32))


@triton.jit
def step_of(alpha, row, s: tl.constexpr, scale, COUNT: tl.constexpr, SOLVES: tl.constexpr):
    """t of one problem: alpha_s, or the largest of a ray."""
    t = tl.load(alpha[0] + row * alpha[1] + s * alpha[2]).to(tl.float32) * scale
    if SOLVES == 1:
        for k in tl.static_range(COUNT):
            a = tl.load(alpha[0] + row * alpha[1] + k * alpha[2]).to(tl.float32) * scale
            t = tl.where((a > t) | (a != a), a, t)
    return t


@triton.jit
def clamped(models, rows, row, k: tl.constexpr, cols, mask, base):
    """(centred d_k clamped to [-60, 60] and 0 where base is -inf, whether it moves), [BLOCK]."""
    expert, anti = load_pair(models, k, row, cols, mask)
    count: tl.constexpr = len(models[2])
    d = difference(expert, anti) - tl.load(rows + (row * count + k) * 4 + 2)
    free = tl.where((d > CLAMP) | (d < -CLAMP), 0.0, 1.0)
    d = tl.where(d > CLAMP, CLAMP, tl.where(d < -CLAMP, -CLAMP, d))
    return tl.where(base == -INF, 0.0, d), free


@triton.jit
def direction_of(alpha, row, k: tl.constexpr, t, scale):
    """u_k = alpha_k / t of a ray."""
    a = tl.load(alpha[0] + row * alpha[1] + k * alpha[2]).to(tl.float32) * scale
    return tl.where(t == 0.0, 0.0, a / t)


@triton.jit
def shift_of(models, rows, alpha, row, s: tl.constexpr, t, scale, cols, mask, base, SOLVES: tl.constexpr):
    """x of one problem, [BLOCK]."""
    count: tl.constexpr = len(models[2])
    if SOLVES > 1:
        x, _ = clamped(models, rows, row, s, cols, mask, base)
    else:
        x = tl.zeros(cols.shape, tl.float32)
        for k in tl.static_range(count):
            d, _ = clamped(models, rows, row, k, cols, mask, base)
            x += direction_of(alpha, row, k, t, scale) * d
    return x


@triton.jit
def _moments_kernel(
    models, vocab, tiles, i_rows, alpha, scale, o_moments, COUNT: tl.constexpr, SOLVES: tl.constexpr,
    BLOCK: tl.constexpr
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocab
    base = load_row(models[0], models[1], row, cols, mask)  # [BLOCK]
    low = tile_max(base)
    start = tl.sum(tl.exp(base - safe(low)), 0)
    for s in tl.static_range(SOLVES):
        t = step_of(alpha, row, s, scale, COUNT, SOLVES)
        x = shift_of(models, i_rows, alpha, row, s, t, scale, cols, mask, base, SOLVES)
        e = base + t * x
        top = tile_max(e)
        w = tl.exp(e - safe(top))
        out = o_moments + (row * SOLVES + s) * 6 * tiles + tile
        tl.store(out, low)
        tl.store(out + tiles, start)
        tl.store(out + 2 * tiles, top)
        tl.store(out + 3 * tiles, tl.sum(w, 0))
        tl.store(out + 4 * tiles, tl.sum(w * x, 0))
        tl.store(out + 5 * tiles, tl.sum(w * x * x, 0))


@triton.jit
def _scales_kernel(
    tiles, i_moments, alpha, saturated, grad, scale, i_rows, has_target, o_scales, o_target,
    COUNT: tl.constexpr, SOLVES: tl.constexpr, TILES: tl.constexpr,
):
    """Per problem: lse of base, lse under the tilt, mean, and s = grad_t / (t Var); and dtarget."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    for s in tl.static_range(SOLVES):
        part = i_moments + (row * SOLVES + s) * 6 * tiles
        _, lse_base = merged(part, part + tiles, i, tiles)
        top, lse = merged(part + 2 * tiles, part + 3 * tiles, i, tiles)
        f = tl.exp(tl.load(part + 2 * tiles + i, mask=i < tiles, other=-INF) - top).to(tl.float64)
        total = tl.exp(lse - top.to(tl.float64))
        mean = tl.sum(f * tl.load(part + 4 * tiles + i, mask=i < tiles, other=0.0), 0) / total
        variance = tl.sum(f * tl.load(part + 5 * tiles + i, mask=i < tiles, other=0.0), 0) / total - mean * mean
        t = step_of(alpha, row, s, scale, COUNT, SOLVES)
        g = tl.load(grad[0] + row * grad[1] + s * grad[2]).to(tl.float32) / scale
        stuck = tl.load(saturated[0] + row * saturated[1] + s * saturated[2]).to(tl.int32)
        if SOLVES == 1:
            g = g * direction_of(alpha, row, 0, t, scale)
            for k in tl.static_range(1, COUNT):
                g += tl.load(grad[0] + row * grad[1] + k * grad[2]).to(tl.float32) / scale * direction_of(
                    alpha, row, k, t, scale
                )
                stuck = tl.maximum(stuck, tl.load(saturated[0] + row * saturated[1] + k * saturated[2]).to(tl.int32))
        found = tl.where((stuck > 0) | (t == 0.0), 0.0, (g / (t * variance)).to(tl.float32))
        out = o_scales + (row * SOLVES + s) * 4
        tl.store(out, lse_base.to(tl.float32))
        tl.store(out + 1, lse.to(tl.float32))
        tl.store(out + 2, mean.to(tl.float32))
        tl.store(out + 3, found)
        for k in tl.static_range(COUNT):
            if SOLVES == 1 or k == s:
                tl.store(o_target + row * COUNT + k, found / (COUNT if SOLVES == 1 else 1) * has_target)


@triton.jit
def store_row(out, row, cols, values):
    """Write a block of a row of the gradient (tensor, row stride, width)."""
    tl.store(out[0] + row * out[1] + cols, values.to(out[0].dtype.element_ty), mask=cols < out[2])


@triton.jit
def target_terms(models, rows, row, k: tl.constexpr, cols, mask, factor):
    """factor times dT_k/dz_k and dT_k/dz_0, exactly 0 for a factor of 0."""
    expert, anti = load_pair(models, k, row, cols, mask)
    count: tl.constexpr = len(models[2])
    here = rows + (row * count + k) * 4
    q, q_anti = tl.exp(expert - tl.load(here)), tl.exp(anti - tl.load(here + 1))
    d = difference(expert, anti) - tl.load(here + 2) - tl.load(here + 3)
    to_expert = tl.where(q == 0.0, 0.0, q * d)
    zero = factor == 0.0
    return tl.where(zero, 0.0, factor * to_expert), tl.where(zero, 0.0, factor * (q_anti - q))


@triton.jit
def _write_kernel(
    models, vocab, tiles, i_rows, i_scales, alpha, scale, o_base, o_experts, o_anti,
    COUNT: tl.constexpr, SOLVES: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocab
    base = load_row(models[0], models[1], row, cols, mask)  # [BLOCK]
    d_base = tl.zeros((BLOCK,), tl.float32)
    shared = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(COUNT):
        here = i_scales + (row * SOLVES + (k if SOLVES > 1 else 0)) * 4
        factor = tl.load(here + 3)
        t = step_of(alpha, row, k, scale, COUNT, SOLVES)
        x = shift_of(models, i_rows, alpha, row, k, t, scale, cols, mask, base, SOLVES)
        p = tl.where(mask, tl.exp(base + t * x - tl.load(here + 1)), 0.0)
        lean = t * p * (x - tl.load(here + 2))
        if SOLVES > 1 or k == 0:
            start = tl.where(mask, tl.exp(base - tl.load(here)), 0.0)
            d_base -= tl.where(factor == 0.0, 0.0, factor * (lean - p + start))
        u = direction_of(alpha, row, k, t, scale) if SOLVES == 1 else 1.0
        _, free = clamped(models, i_rows, row, k, cols, mask, base)
        d_expert = tl.where(factor == 0.0, 0.0, -factor * t * u * lean * free)
        d_anti = -d_expert
        if TARGETS:
            share = factor / (COUNT if SOLVES == 1 else 1)
            to_expert, to_anti = target_terms(models, i_rows, row, k, cols, mask, share)
            d_expert += tl.where(mask, to_expert, 0.0)
            d_anti += tl.where(mask, to_anti, 0.0)
        store_row(o_experts[k], row, cols, tl.where(mask, d_expert, 0.0))
        if len(o_anti) > 1:
            store_row(o_anti[k], row, cols, tl.where(mask, d_anti, 0.0))
        else:
            shared += d_anti
    if len(o_anti) == 1:
        store_row(o_anti[0], row, cols, tl.where(mask, shared, 0.0))
    store_row(o_base, row, cols, tl.where(mask, d_base, 0.0))


def launch_dynamic_fusion_weights_backward(
    grad_alpha: Any, alpha: Any, saturated: Any, base: Any, experts: Any, anti: Any, multi: int, direction_kind: int,
    direction: Any, average: bool, has_target: bool, vocab_size: int,
) -> tuple[Any, list[Any], list[Any], Any]:
    """Arguments of `dynamic_fusion_weights_backward` -> (dbase, dexperts, danti, dtarget)."""
    rows, count, f32 = base.shape[0], len(experts), dtype(base, "float32")
    solves = count if multi == 1 else 1
    models = models_tuple(base, experts, anti)
    targets, _, _, tiles = sweep(models, vocab_size, 1.0, 0, 0, None, f32)
    power, block = next_power(tiles), sweep_width(vocab_size)
    per_row = base.new_empty((rows, count, 4), dtype=f32)
    launch(_rows_kernel, rows, base, tiles, targets, per_row, COUNT=count, TILES=power)
    scale = float(count) if average and multi == 1 else 1.0
    step, shape = (alpha, *alpha.stride()), {"COUNT": count, "SOLVES": solves}
    moments = base.new_empty((rows, solves, 6, tiles), dtype=f32)
    launch(
        _moments_kernel, rows * tiles, base, models, vocab_size, tiles, per_row, step, scale, moments,
        BLOCK=block, **shape,
    )
    scales, dtarget = base.new_empty((rows, solves, 4), dtype=f32), base.new_empty((rows, count), dtype=f32)
    launch(
        _scales_kernel, rows, base, tiles, moments, step, (saturated, *saturated.stride()),
        (grad_alpha, *grad_alpha.stride()), scale, per_row, float(has_target), scales, dtarget, TILES=power, **shape,
    )
    dbase, *rest = (t.new_empty(tuple(t.shape)) for t in (base, *experts, *anti))
    outs = [(t, t.stride(0), t.shape[1]) for t in (dbase, *rest)]
    wide = cdiv(max(width for _, _, width in outs), block)
    launch(
        _write_kernel, rows * wide, base, models, vocab_size, wide, per_row, scales, step, scale, outs[0],
        tuple(outs[1 : count + 1]), tuple(outs[count + 1 :]), TARGETS=not has_target, BLOCK=block, **shape,
    )
    return dbase, rest[:count], rest[count:], dtarget


def supports_dynamic_fusion_weights_backward(
    grad_alpha: Any, alpha: Any, saturated: Any, base: Any, experts: Any, anti: Any, multi: int, *_: Any
) -> str | None:
    """The reason the kernels cannot serve a call, or None."""
    if multi == 2:
        return "the product grid is for comparison only and served by the reference"
    return refuse_double(base, *experts, *anti)


def aot_cases() -> list[AotCase]:
    """One expert in bf16, two decoupled experts in fp32."""

    def case(kind: str, vocab_size: int, count: int, multi: int) -> None:
        base, anti, *experts = (Meta((8, vocab_size), kind) for _ in range(count + 2))
        alpha = Meta((8, count), "float32")
        launch_dynamic_fusion_weights_backward(
            alpha, alpha, Meta((8, count), "bool"), base, experts, [anti], multi, 0, None, False, False, vocab_size
        )

    return [
        AotCase("bf16-k1-v151936", lambda: case("bfloat16", 151936, 1, 0)),
        AotCase("fp32-k2-v32000-decoupled", lambda: case("float32", 32000, 2, 1)),
    ]
