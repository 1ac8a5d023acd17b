"""Where a row's kept prefix may end, found over tiles, so that one program need not sweep the row for it.

    W_j = the count (or mass) of {v : z_v >= m - (j + 1) / 2}, j < LEVELS, m = max_v z_v; the last level is all of them

A program a tile writes its part of W. The prefix ends between the two levels that have the need between them; a program
a tile puts the columns there into the row's list, in index order, and a tile without any ends before it reads its
logits. With top-k the list has all columns from the lower level up, because another filter may follow. A list longer
than LIST is left, and the row itself is searched (filters.py). Floor: K + 2 logit tensors read once; 256 bytes a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, launch, next_power, ordered_key, row_tile, safe, tile_width
from .fusion import load_fused
from .partials import merge_sums

LEVELS = tl.constexpr(32)
LIST = tl.constexpr(2048)
SLACK = tl.constexpr(2.0**-21)  # reference/logit_fusion/filters.py: how ties are decided
BOTTOM = tl.constexpr(-2139095040)  # the key of the most negative finite float32
PART = tl.constexpr(256)  # columns of a step: LEVELS sums of each stay in registers


@triton.jit
def nucleus_need(mass, top_p):
    """What the mass of a prefix must reach, float64."""
    return mass * top_p - mass * (SLACK * tl.minimum(top_p, 16 * (1 - top_p)))


@triton.jit
def first_need(total, top_k, top_p, TOP_K: tl.constexpr):
    """The need of the first filter, float64: a count with top-k, else a mass relative to exp(m)."""
    if TOP_K:
        need = tl.full((), top_k, tl.float64)  # 1 is a plain int there
    else:
        need = nucleus_need(total.to(tl.float64), top_p)
    return need


@triton.jit
def level_keys(top):
    """Ordered keys of the levels, int32 [LEVELS], falling."""
    j = tl.arange(0, LEVELS)
    return tl.where(j < LEVELS - 1, ordered_key(top - 0.5 * (j + 1)), BOTTOM)


@triton.jit
def _weigh_kernel(
    fusion, vocab, tiles, i_partial, o_levels, MASS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    row, tile = row_tile(tiles)
    top, _, _, _ = merge_sums(i_partial, row, tiles, TILES)
    keys = level_keys(top)
    counts = tl.zeros((LEVELS, PART), tl.float32)
    masses = tl.zeros((LEVELS, PART), tl.float32)
    for start in range(0, BLOCK, PART):
        cols = tile * BLOCK + start + tl.arange(0, PART)
        z = load_fused(fusion, row, cols, cols < vocab)  # [PART]
        over = (z > -INF)[None, :] & (ordered_key(z)[None, :] >= keys[:, None])
        counts += tl.where(over, 1.0, 0.0)
        if MASS:
            masses += tl.where(over, tl.exp(z - safe(top))[None, :], 0.0)
    out = o_levels + (row * 2 * tiles + tile) * LEVELS + tl.arange(0, LEVELS)
    tl.store(out, tl.sum(counts, 1))
    if MASS:
        tl.store(out + tiles * LEVELS, tl.sum(masses, 1))


@triton.jit
def bracket(i_levels, row, tiles, top, need, MASS: tl.constexpr, TILES: tl.constexpr):
    """(level n, key of n, key of n - 1, W_n, W_n-1): the first level that meets the need, the last if none does."""
    i, j = tl.arange(0, TILES), tl.arange(0, LEVELS)
    part = i_levels + row * 2 * tiles * LEVELS
    if MASS:
        part += tiles * LEVELS
    w = tl.load(part + i[:, None] * LEVELS + j[None, :], mask=i[:, None] < tiles, other=0.0)
    w = tl.sum(w.to(tl.float64), 0)  # [LEVELS]
    keys = level_keys(top).to(tl.int64)
    n = tl.minimum(tl.sum((w < need).to(tl.int32), 0), LEVELS - 1)
    low = tl.sum(tl.where(j == n, keys, 0), 0)
    high = tl.where(n > 0, tl.sum(tl.where(j == n - 1, keys, 0), 0), ordered_key(top).to(tl.int64) + 1)
    return n, low, high, tl.sum(tl.where(j == n, w, 0.0), 0), tl.sum(tl.where(j == n - 1, w, 0.0), 0)


@triton.jit
def list_sizes(i_levels, row, tiles, n, WHOLE: tl.constexpr, TILES: tl.constexpr):
    """Columns of the list in each tile, int32 [TILES]: from level n up, or below level n - 1 only."""
    i = tl.arange(0, TILES)
    counts = i_levels + (row * 2 * tiles + i) * LEVELS + n
    sizes = tl.load(counts, mask=i < tiles, other=0.0)
    if not WHOLE:
        sizes -= tl.load(counts - 1, mask=(i < tiles) & (n > 0), other=0.0)
    return sizes.to(tl.int32)


@triton.jit
def _list_kernel(
    fusion, vocab, tiles, i_partial, i_levels, top_k, top_p: tl.float64, o_values, o_places,
    TOP_K: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile = row_tile(tiles)
    top, total, _, _ = merge_sums(i_partial, row, tiles, TILES)
    need = first_need(total, top_k, top_p, TOP_K)
    n, low, high, _, _ = bracket(i_levels, row, tiles, top, need, not TOP_K, TILES)
    i, sizes = tl.arange(0, TILES), list_sizes(i_levels, row, tiles, n, TOP_K, TILES)
    own = tl.sum(tl.where(i == tile, sizes, 0), 0)
    if (own > 0) & (tl.sum(sizes, 0) <= LIST):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        z = load_fused(fusion, row, cols, cols < vocab)  # [BLOCK]
        key = ordered_key(z).to(tl.int64)
        take = (z > -INF) & (key >= low)
        if not TOP_K:
            take = take & (key < high)
        place = tl.sum(tl.where(i < tile, sizes, 0), 0) + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(o_values + row * LIST + place, z, mask=take)
        tl.store(o_places + row * LIST + place, cols, mask=take)


def listed(
    fusion: tuple[Any, ...], vocab_size: int, partial: Any, tiles: int, kind: Any, top_k: int, top_p: float,
    by_count: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Levels [B, 2, tiles, LEVELS] float32 and the rows' lists: values [B, LIST] float32, columns of dtype ``kind``."""
    rows, like = partial.shape[0], partial
    levels = like.new_empty((rows, 2, tiles, LEVELS.value))
    values = like.new_empty((rows, LIST.value))
    places = like.new_empty((rows, LIST.value), dtype=kind)
    shape = {"TILES": next_power(tiles), "BLOCK": tile_width(vocab_size)}
    launch(
        _weigh_kernel, rows * tiles, like, fusion, vocab_size, tiles, partial, levels, MASS=not by_count, **shape
    )
    launch(
        _list_kernel, rows * tiles, like, fusion, vocab_size, tiles, partial, levels, top_k, top_p, values, places,
        TOP_K=by_count, **shape,
    )  # fmt: skip
    return levels, values, places
