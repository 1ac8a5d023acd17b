"""One pass over the vocabulary for Dynamic Logits Fusion: KL targets, and the tilted sums at every node.

    T_k = KL(Q_k || Q_0),   S_{j,r} = sum_v exp(z_v - M_0 + alpha_j y_v) y_v^r, r = 0..3,   y = x - c, x = sum_k u_k d_k

at alpha_j = j alpha_max / J, with M_0 = max z, M_1 = max(z + alpha_max x), c = (M_1 - M_0) / alpha_max: the exponents
are linear in alpha and at most 0 at both ends, so nothing overflows. exp(alpha_j y) = t^j, t = exp(h y): one
multiplication a node.

One program a tile of a row; the tile stays in registers for all nodes. Partials are tile-local (own M_0, c) and merged
in float64 with f = exp(M_0 - M_0' + alpha_j delta), delta = c - c'. Floor: K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, INTERPRETED, cdiv, launch, next_power, row_tile, safe
from .fusion import difference, load_pair, load_row
from .partials import tile_max

DROP = tl.constexpr(-80.0)  # exponents below it at both ends of the range carry no mass at any node
CHUNK = tl.constexpr(16)  # tiles merged at a time


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def sum4(a, b, c, d):
    """Four sums in one reduction."""
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        return tl.reduce((a, b, c, d), 0, _add4)


@triton.jit
def target_sums(expert, anti, d, mask, base, out, tiles):
    """Partials of T_k: (max, sum) of expert and anti, sum of q (d - c), range of d where base has mass."""
    top, top_anti = tile_max(expert), tile_max(anti)
    q = tl.exp(expert - safe(top))
    c = safe(top) - safe(top_anti)
    tl.store(out, top)
    tl.store(out + tiles, tl.sum(q, 0))
    tl.store(out + 2 * tiles, tl.sum(tl.where(q == 0.0, 0.0, q * (d - c)), 0))
    tl.store(out + 3 * tiles, top_anti)
    tl.store(out + 4 * tiles, tl.sum(tl.exp(anti - safe(top_anti)), 0))
    tl.store(out + 5 * tiles, tl.min(tl.where(base == -INF, INF, d), 0))
    tl.store(out + 6 * tiles, tl.max(tl.where(base == -INF, -INF, d), 0))


@triton.jit
def node_sums(base, x, alpha_max, out, lines, tiles, NODES: tl.constexpr):
    """S_{j,r} of a tile for every node, and its M_0 and M_1."""
    x = tl.where((base == -INF) | (tl.abs(x) == INF), 0.0, x)  # infinite shifts: the row is solved again, clamped
    low, high = tile_max(base), tile_max(base + alpha_max * x)
    y = tl.where(base == -INF, 0.0, x - (safe(high) - safe(low)) / alpha_max)
    start = base - safe(low)
    drop = (start < DROP) & (start + alpha_max * y < DROP)
    start, y = tl.where(drop, -INF, start), tl.where(drop, 0.0, y)
    # t^j needs a weight that does not underflow at alpha = 0
    by_power = tl.min(tl.where(start == -INF, 0.0, start), 0) >= DROP
    step = alpha_max / NODES
    w, t = tl.exp(start), tl.exp(tl.minimum(step * y, 80.0))
    tl.store(lines, low)
    tl.store(lines + tiles, high)
    for j in range(NODES + 1):
        if not by_power:
            w = tl.exp(start + (j * step) * y)
        w1 = w * y
        w2 = w1 * y
        s0, s1, s2, s3 = sum4(w, w1, w2, w2 * y)
        here = out + j * tiles
        tl.store(here, s0)
        tl.store(here + (NODES + 1) * tiles, s1)
        tl.store(here + 2 * (NODES + 1) * tiles, s2)
        tl.store(here + 3 * (NODES + 1) * tiles, s3)
        w = w * t


@triton.jit
def _sweep_kernel(
    models, vocab, tiles, direction, alpha_max, o_targets, o_nodes, o_lines,
    SOLVES: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocab
    count: tl.constexpr = len(models[2])
    base = load_row(models[0], models[1], row, cols, mask)  # [BLOCK]
    x = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(count):
        expert, anti = load_pair(models, k, row, cols, mask)
        d = difference(expert, anti)
        if o_targets is not None:
            target_sums(expert, anti, d, mask, base, o_targets + (row * count + k) * 7 * tiles + tile, tiles)
        if SOLVES > 1:
            sums = o_nodes + (row * SOLVES + k) * 4 * (NODES + 1) * tiles + tile
            node_sums(base, d, alpha_max, sums, o_lines + (row * SOLVES + k) * 2 * tiles + tile, tiles, NODES)
        elif direction is not None:
            x += tl.where(d == 0.0, 0.0, tl.load(direction + row * count + k) * d)
        else:
            x += d
    if SOLVES == 1:
        all_sums = o_nodes + row * 4 * (NODES + 1) * tiles + tile
        node_sums(base, x, alpha_max, all_sums, o_lines + row * 2 * tiles + tile, tiles, NODES)


@triton.jit
def merge_target(partial, tiles, TILES: tl.constexpr):
    """(T_k, lse_k - lse_0, smallest d, largest d) of the partials of one expert; float64, the range float32."""
    i = tl.arange(0, TILES)
    m = i < tiles
    tops, tops_anti = tl.load(partial + i, mask=m, other=-INF), tl.load(partial + 3 * tiles + i, mask=m, other=-INF)
    top, top_anti = tile_max(tops), tile_max(tops_anti)
    f = tl.exp(tops - top).to(tl.float64)
    sums = tl.load(partial + tiles + i, mask=m, other=0.0).to(tl.float64)
    first = tl.load(partial + 2 * tiles + i, mask=m, other=0.0).to(tl.float64)
    center = top.to(tl.float64) - top_anti.to(tl.float64)
    delta = safe(tops).to(tl.float64) - safe(tops_anti).to(tl.float64) - center
    total = tl.sum(sums * f, 0)
    sums_anti = tl.load(partial + 4 * tiles + i, mask=m, other=0.0) * tl.exp(tops_anti - top_anti)
    log_ratio = tl.log(total) - tl.log(tl.sum(sums_anti.to(tl.float64), 0))
    kl = tl.sum(tl.where(sums == 0.0, 0.0, f * (first + delta * sums)), 0) / total - log_ratio
    low = tl.min(tl.load(partial + 5 * tiles + i, mask=m, other=INF), 0)
    high = tl.max(tl.load(partial + 6 * tiles + i, mask=m, other=-INF), 0)
    return tl.where(kl < 0, 0.0, kl), center + log_ratio, low, high


@triton.jit
def merge_nodes(nodes, lines, tiles, alpha_max, NODES: tl.constexpr, NP: tl.constexpr, TILES: tl.constexpr):
    """Per node, float64 [NP]: A, m, variance, third central moment; and log sum exp of base."""
    every = tl.arange(0, TILES)
    low = tile_max(tl.load(lines + every, mask=every < tiles, other=-INF))
    high = tile_max(tl.load(lines + tiles + every, mask=every < tiles, other=-INF))
    c = (high.to(tl.float64) - low.to(tl.float64)) / alpha_max
    j = tl.arange(0, NP)
    alpha = tl.minimum(j, NODES).to(tl.float64) * (alpha_max / NODES)
    s0 = tl.zeros((NP, CHUNK), tl.float64)
    s1, s2, s3 = s0, s0, s0
    for start in range(0, tiles, CHUNK):
        i = start + tl.arange(0, CHUNK)
        m = (j[:, None] <= NODES) & (i[None, :] < tiles)
        lows = tl.load(lines + i, mask=i < tiles, other=-INF)
        highs = tl.load(lines + tiles + i, mask=i < tiles, other=-INF)
        delta = tl.where(lows > -INF, (safe(highs).to(tl.float64) - safe(lows).to(tl.float64)) / alpha_max - c, 0.0)
        exponent = (lows - low).to(tl.float64)[None, :] + alpha[:, None] * delta[None, :]
        f = tl.exp(exponent.to(tl.float32)).to(tl.float64)
        at = nodes + j[:, None] * tiles + i[None, :]
        stride = (NODES + 1) * tiles
        t0 = tl.load(at, mask=m, other=0.0).to(tl.float64) * f
        t1 = tl.load(at + stride, mask=m, other=0.0).to(tl.float64) * f
        t2 = tl.load(at + 2 * stride, mask=m, other=0.0).to(tl.float64) * f
        t3 = tl.load(at + 3 * stride, mask=m, other=0.0).to(tl.float64) * f
        e = delta[None, :]
        s0 += t0
        s1 += t1 + e * t0
        s2 += t2 + e * (2.0 * t1 + e * t0)
        s3 += t3 + e * (3.0 * t2 + e * (3.0 * t1 + e * t0))
    z0 = tl.sum(s0, 1)
    z0 = tl.where(j <= NODES, z0, 1.0)
    m1, m2, m3 = tl.sum(s1, 1) / z0, tl.sum(s2, 1) / z0, tl.sum(s3, 1) / z0
    log_start = tl.sum(tl.where(j == 0, tl.log(z0), 0.0), 0)
    variance = m2 - m1 * m1
    return tl.log(z0) - log_start, m1, variance, m3 - 3.0 * m1 * m2 + 2.0 * m1 * m1 * m1, log_start + low.to(tl.float64)


def sweep_width(vocab_size: int) -> int:
    """Columns of one program of the sweep."""
    return 1024 if vocab_size <= 32768 else 2048


def sweep(
    models: tuple[Any, ...], vocab_size: int, alpha_max: float, nodes: int, solves: int, direction: Any, f32: Any
) -> tuple[Any, Any, Any, int]:
    """Partials: targets [B, K, 7, tiles], nodes [B, solves, 4, J + 1, tiles], lines [B, solves, 2, tiles]; tiles."""
    base, count = models[0], len(models[2])
    rows, block = base.shape[0], sweep_width(vocab_size)
    tiles = cdiv(vocab_size, block)
    targets = base.new_empty((rows, count, 7, tiles), dtype=f32)
    sums = base.new_empty((rows, solves, 4, nodes + 1, tiles), dtype=f32)
    lines = base.new_empty((rows, solves, 2, tiles), dtype=f32)
    launch(
        _sweep_kernel, rows * tiles, base, models, vocab_size, tiles, direction, float(alpha_max), targets, sums, lines,
        SOLVES=solves, NODES=nodes, BLOCK=block,
    )
    return targets, sums, lines, tiles


def node_power(nodes: int) -> int:
    """Lanes that hold the nodes 0..J."""
    return next_power(nodes + 1)
