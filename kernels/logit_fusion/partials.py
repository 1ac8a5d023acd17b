"""Per-tile partials of a fused row and their merge: what stats, log-softmax and sampling are built on.

    m = max_v z_v,   S = sum_v exp(z_v - m),   E = sum_v exp(z_v - m) (z_v - m),   n = #{v : z_v > -inf}

One program a tile of a row writes (m, S, E, n) and the first index of m; whoever needs the row merges its tiles.
Floor: the K + 2 logit tensors read once; partials are 20 bytes a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, cdiv, dtype, launch, next_power, row_tile, safe, tile_width
from .fusion import load_fused


@triton.jit
def tile_max(z):
    """Largest entry of a block; NaN if there is one."""
    nan = tl.max((z != z).to(tl.int32), 0) > 0
    return tl.where(nan, float("nan"), tl.max(tl.where(z == z, z, -INF), 0))


@triton.jit
def first_index(z, top, cols):
    """Smallest column whose entry is ``top`` (NaN counts as equal to NaN)."""
    found = tl.where(top != top, (z != z).to(tl.int32), (z == top).to(tl.int32))
    return tl.min(tl.where(found > 0, cols, NO_INDEX), 0)


@triton.jit
def _tile_stats_kernel(fusion, vocab, tiles, i_partial, i_index, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    z = load_fused(fusion, row, cols, cols < vocab)  # [BLOCK]
    top = tile_max(z)
    out = i_partial + row * 4 * tiles + tile
    tl.store(out, top)
    tl.store(i_index + row * tiles + tile, first_index(z, top, cols))
    x = z - safe(top)
    e = tl.exp(x)
    tl.store(out + tiles, tl.sum(e, 0))
    tl.store(out + 2 * tiles, tl.sum(tl.where(x == -INF, 0.0, e * x), 0))
    tl.store(out + 3 * tiles, tl.sum((z > -INF).to(tl.float32), 0))


@triton.jit
def merge_sums(partial, row, tiles, TILES: tl.constexpr):
    """A row's (max, sum relative to the finite max, per-tile max, per-tile sum relative to the row max)."""
    i = tl.arange(0, TILES)
    tops = tl.load(partial + row * 4 * tiles + i, mask=i < tiles, other=-INF)  # [TILES]
    sums = tl.load(partial + row * 4 * tiles + tiles + i, mask=i < tiles, other=0.0)
    top = tile_max(tops)
    sums = sums * tl.exp(safe(tops) - safe(top))
    return top, tl.sum(sums, 0), tops, sums


@triton.jit
def row_lse(top, total):
    """log sum exp of a row; float64 inside, so that it is rounded once."""
    return (tl.log(total.to(tl.float64)) + safe(top).to(tl.float64)).to(tl.float32)


@triton.jit
def log_probability(z, top, total):
    """z - lse without the rounding of lse, which is large next to it where the logits are."""
    return ((z - safe(top)).to(tl.float64) - tl.log(total.to(tl.float64))).to(tl.float32)


@triton.jit
def _merge_lse_kernel(tiles, i_partial, o_lse, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total, _, _ = merge_sums(i_partial, row, tiles, TILES)
    tl.store(o_lse + row, row_lse(top, total))


def tile_stats(fusion: tuple[Any, ...], rows: int, vocab_size: int) -> tuple[Any, Any, int]:
    """Partials [B, 4, tiles] float32 (max, sum, moment, count), argmax [B, tiles] int32, the number of tiles."""
    base, block = fusion[0], tile_width(vocab_size)
    tiles = cdiv(vocab_size, block)
    partial = base.new_empty((rows, 4, tiles), dtype=dtype(base, "float32"))
    index = base.new_empty((rows, tiles), dtype=dtype(base, "int32"))
    launch(_tile_stats_kernel, rows * tiles, base, fusion, vocab_size, tiles, partial, index, BLOCK=block)
    return partial, index, tiles


def merged_lse(partial: Any, tiles: int) -> Any:
    """lse [B] float32 of the partials."""
    lse = partial.new_empty((partial.shape[0],))
    launch(_merge_lse_kernel, partial.shape[0], lse, tiles, partial, lse, TILES=next_power(tiles))
    return lse
