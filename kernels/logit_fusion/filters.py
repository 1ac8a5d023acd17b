"""Top-k and top-p without a sort: the exact last element of the kept prefix, by (value descending, index ascending).

A prefix is {v : z_v > t or (z_v = t and v <= i)}. With W(t) = the count (or mass) of {z >= t}, t is the largest value
with W(t) >= need: a search with THRESHOLDS thresholds a pass, the first pass half a nat apart below the maximum, the
next ones in the float's ordered integers, until one value is left; ties are cut by index in one more pass.

One program a row; a pass reads the row (from L2 while the batch's logits fit there). Sums stay in lanes until the end
of a pass.
Floor: K + 2 logit tensors read once; about five passes in all for float32 logits.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, dtype, launch, next_power, ordered_key
from .fusion import fusion_tuple, load_fused, models_tuple
from .partials import merge_sums, tile_stats

THRESHOLDS = tl.constexpr(16)
SLACK = tl.constexpr(2.0**-21)  # reference/logit_fusion/filters.py: how ties are decided
LOWEST = tl.constexpr(-(2**31))  # below every key
BOTTOM = tl.constexpr(-2139095040)  # the key of the most negative finite float32


@triton.jit
def key_value(key):
    """The float32 of an ordered key."""
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(fusion, row, start, vocab, limit, limit_index, BLOCK: tl.constexpr):
    """(z, key, inside) of a block: inside the prefix that ends at (limit, limit_index), -inf excluded."""
    cols = start + tl.arange(0, BLOCK)
    z = load_fused(fusion, row, cols, cols < vocab)
    key = ordered_key(z).to(tl.int64)
    return z, key, (z > -INF) & ((key > limit) | ((key == limit) & (cols <= limit_index)))


@triton.jit
def weights_from(fusion, row, vocab, top, limit, limit_index, thresholds, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """W at each threshold, float64 [THRESHOLDS]: count, or mass relative to exp(top), of the keys from it up."""
    lanes = tl.zeros((THRESHOLDS, BLOCK), tl.float32)
    for start in range(0, vocab, BLOCK):
        z, key, inside = load_keys(fusion, row, start, vocab, limit, limit_index, BLOCK)
        w = tl.where(inside, tl.exp(z - top) if MASS else 1.0, 0.0)
        lanes += tl.where(key[None, :] >= thresholds[:, None], w[None, :], 0.0)
    return tl.sum(lanes.to(tl.float64), 1)


@triton.jit
def equal_index(fusion, row, vocab, limit, limit_index, wanted, rank, BLOCK: tl.constexpr):
    """Column of the rank-th (from 1) element of key ``wanted``, in index order."""
    seen = rank * 0
    found = seen + NO_INDEX
    for start in range(0, vocab, BLOCK):
        _, key, inside = load_keys(fusion, row, start, vocab, limit, limit_index, BLOCK)
        equal = (inside & (key == wanted)).to(tl.int32)
        place = tl.cumsum(equal, 0) + seen
        cols = start + tl.arange(0, BLOCK)
        found = tl.minimum(found, tl.min(tl.where((equal > 0) & (place == rank), cols, NO_INDEX), 0))
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def prefix_end(fusion, row, vocab, top, limit, limit_index, need, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(key, index) of the last element of the shortest prefix with W >= need; the limit itself if there is none."""
    j = tl.arange(0, THRESHOLDS)
    keys = ordered_key(top - 0.5 * (j + 1)).to(tl.int64)
    w = weights_from(fusion, row, vocab, top, limit, limit_index, keys, MASS, BLOCK)
    n = tl.sum((w < need).to(tl.int32), 0)  # thresholds still too high
    low = tl.where(n < THRESHOLDS, ordered_key(top - 0.5 * (n + 1)), BOTTOM).to(tl.int64)
    high = tl.where(n > 0, ordered_key(top - 0.5 * n), ordered_key(top) + 1).to(tl.int64)
    w_low = tl.sum(tl.where(j == n, w, 0.0), 0)
    w_high = tl.sum(tl.where(j == n - 1, w, 0.0), 0)
    while high - low > 1:  # W(low) >= need > W(high)
        keys = low + (high - low) * (j + 1) // (THRESHOLDS + 1)
        w = weights_from(fusion, row, vocab, top, limit, limit_index, keys, MASS, BLOCK)
        n = tl.sum((w >= need).to(tl.int32), 0)
        w_low = tl.where(n > 0, tl.sum(tl.where(j == n - 1, w, 0.0), 0), w_low)
        w_high = tl.where(n < THRESHOLDS, tl.sum(tl.where(j == n, w, 0.0), 0), w_high)
        span = high - low
        high = tl.where(n < THRESHOLDS, low + span * (n + 1) // (THRESHOLDS + 1), high)
        low = tl.where(n > 0, low + span * n // (THRESHOLDS + 1), low)
    unit = tl.maximum(tl.exp(key_value(low) - top) if MASS else 1.0, 1e-37).to(tl.float64)
    rank = tl.minimum(tl.ceil((need - w_high) / unit), 2147483647.0).to(tl.int32)
    many = tl.minimum((w_low - w_high) / unit + 0.5, 2147483647.0).to(tl.int32)
    index = NO_INDEX + rank * 0
    if rank < many:
        index = equal_index(fusion, row, vocab, limit, limit_index, low, rank, BLOCK)
    inside = (low > limit) | ((low == limit) & (index < limit_index))
    return tl.where(inside, low, limit), tl.where(inside, index, limit_index)


@triton.jit
def _cut_kernel(
    fusion, vocab, tiles, i_partial, top_k, top_p, o_value, o_index,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top, total, _, _ = merge_sums(i_partial, row, tiles, TILES)
    value, index = top * 0 - INF, (row * 0 + NO_INDEX).to(tl.int32)
    if tl.abs(top) < INF:  # otherwise nothing to filter, or NaN
        limit, limit_index = row * 0 + LOWEST, index
        if TOP_K:
            need = tl.full((), top_k, tl.float64)  # 1 is a plain int there
            limit, limit_index = prefix_end(fusion, row, vocab, top, limit, limit_index, need, False, BLOCK)
        if TOP_P:
            mass = total.to(tl.float64)
            if TOP_K:
                lowest = tl.zeros((THRESHOLDS,), tl.int64) + LOWEST
                w = weights_from(fusion, row, vocab, top, limit, limit_index, lowest, True, BLOCK)
                mass = tl.max(w, 0)
            need = mass * top_p - mass * (SLACK * tl.minimum(top_p, 16 * (1 - top_p)))
            limit, limit_index = prefix_end(fusion, row, vocab, top, limit, limit_index, need, True, BLOCK)
        value = tl.where(limit == LOWEST, -INF, key_value(limit))
        index = limit_index
    tl.store(o_value + row, tl.where(value == value, value, -INF))
    tl.store(o_index + row, index)


@triton.jit
def _relative_cut_kernel(tiles, i_partial, distance, o_value, o_index, TILES: tl.constexpr):
    """The cut of min-p: the least value with value - max >= distance (max + distance may be rounded past it)."""
    row = tl.program_id(0).to(tl.int64)
    top, _, _, _ = merge_sums(i_partial, row, tiles, TILES)
    key = ordered_key(top + distance)
    value = top
    for step in tl.static_range(3):
        near = key_value(key + (1 - step))
        value = tl.where(near - top >= distance, near, value)
    tl.store(o_value + row, tl.where((tl.abs(top) < INF) & (distance > -INF), value, -INF))
    tl.store(o_index + row, NO_INDEX)


def least_distance(min_p: float) -> float:
    """The least z - max of a token that min-p keeps."""
    return math.log(min_p) - SLACK.value if min_p > 0 else -math.inf


def find_cut(
    fusion: tuple[Any, ...], vocab_size: int, partial: Any, tiles: int, top_k: int, top_p: float
) -> tuple[Any, Any]:
    """(value [B] float32, index [B] int32): the end of the kept prefix of every row."""
    rows = partial.shape[0]
    value, index = partial.new_empty((rows,)), partial.new_empty((rows,), dtype=dtype(partial, "int32"))
    launch(
        _cut_kernel, rows, partial, fusion, vocab_size, tiles, partial, top_k, float(top_p), value, index,
        TOP_K=0 < top_k < vocab_size, TOP_P=top_p < 1.0, TILES=next_power(tiles), BLOCK=1024, num_warps=8,
    )
    return value, index


def plausible_fusion(given: Any) -> tuple[Any, ...]:
    """The `fusion` argument of the kernels, with the cut of the base's plausible set found first where there is one."""
    base, plausible, plausible_value = given.base, given.plausible, given.plausible_value
    if plausible == 0 or (plausible == 2 and plausible_value >= 1.0):
        return fusion_tuple(given)
    alone = models_tuple(base, (), ())
    partial, _, tiles = tile_stats(alone, base.shape[0], given.vocab_size)
    if plausible == 2:
        return fusion_tuple(given, find_cut(alone, given.vocab_size, partial, tiles, 0, plausible_value))
    value = partial.new_empty((base.shape[0],))
    index = partial.new_empty((base.shape[0],), dtype=dtype(base, "int32"))
    distance = least_distance(plausible_value)
    launch(_relative_cut_kernel, base.shape[0], base, tiles, partial, distance, value, index, TILES=next_power(tiles))
    return fusion_tuple(given, (value, index))
