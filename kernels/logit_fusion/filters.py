"""Top-k and top-p without a sort: the exact last element of the kept prefix, by (value descending, index ascending).

A prefix is {v : z_v > t or (z_v = t and v <= i)}. With W(t) = the count (or mass) of {z >= t}, t is the largest value
with W(t) >= need. levels.py finds over tiles two values, half a nat apart, between which t lies, and lists the columns
there; one program a row then searches the list with THRESHOLDS thresholds a pass in the float's ordered integers, until
one value is left; ties are cut by index in one more pass. A row whose list would be too long is searched itself: a pass
reads it all (from L2 while the batch's logits fit there). Sums stay in lanes until the end of a pass.
Floor: K + 2 logit tensors read once; two reads, and a third of the tiles that have columns in the list.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, dtype, launch, next_power, ordered_key
from .fusion import fusion_tuple, load_fused, models_tuple
from .levels import BOTTOM, LIST, SLACK, bracket, first_need, list_sizes, listed, nucleus_need
from .partials import merge_sums, tile_stats

THRESHOLDS = tl.constexpr(16)
LOWEST = tl.constexpr(-(2**31))  # below every key


@triton.jit
def key_value(key):
    """The float32 of an ordered key."""
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(
    fusion, values, places, row, start, size, limit, limit_index, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(z, column, key, inside) of a block of the row or its list: inside the prefix that ends at (limit, limit_index),
    -inf excluded."""
    at = start + tl.arange(0, BLOCK)
    if LISTED:
        z = tl.load(values + row * LIST + at, mask=at < size, other=-INF)
        cols = tl.load(places + row * LIST + at, mask=at < size, other=NO_INDEX)
    else:
        z, cols = load_fused(fusion, row, at, at < size), at
    key = ordered_key(z).to(tl.int64)
    return z, cols, key, (z > -INF) & ((key > limit) | ((key == limit) & (cols <= limit_index)))


@triton.jit
def weights_from(
    fusion, values, places, row, size, top, limit, limit_index, thresholds, MASS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """W at each threshold, float64 [THRESHOLDS]: count, or mass relative to exp(top), of the keys from it up."""
    lanes = tl.zeros((THRESHOLDS, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        z, _, key, inside = load_keys(fusion, values, places, row, start, size, limit, limit_index, LISTED, BLOCK)
        w = tl.where(inside, tl.exp(z - top) if MASS else 1.0, 0.0)
        lanes += tl.where(key[None, :] >= thresholds[:, None], w[None, :], 0.0)
    return tl.sum(lanes.to(tl.float64), 1)


@triton.jit
def equal_index(
    fusion, values, places, row, size, limit, limit_index, wanted, rank, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Column of the rank-th (from 1) element of key ``wanted``, in index order."""
    seen = rank * 0
    found = seen + NO_INDEX
    for start in range(0, size, BLOCK):
        _, cols, key, inside = load_keys(fusion, values, places, row, start, size, limit, limit_index, LISTED, BLOCK)
        equal = (inside & (key == wanted)).to(tl.int32)
        place = tl.cumsum(equal, 0) + seen
        found = tl.minimum(found, tl.min(tl.where((equal > 0) & (place == rank), cols, NO_INDEX), 0))
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def prefix_end(
    fusion, values, places, row, size, top, limit, limit_index, need, low, high, w_low, w_high, above,
    MASS: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, index) of the last element of the shortest prefix with W >= need; the limit itself if there is none.

    It lies in keys [low, high), with W(low) and W(high); ``above`` is the W of what is not in the list.
    """
    j = tl.arange(0, THRESHOLDS)
    while high - low > 1:  # W(low) >= need > W(high)
        keys = low + (high - low) * (j + 1) // (THRESHOLDS + 1)
        w = weights_from(fusion, values, places, row, size, top, limit, limit_index, keys, MASS, LISTED, BLOCK) + above
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
        index = equal_index(fusion, values, places, row, size, limit, limit_index, low, rank, LISTED, BLOCK)
    inside = (low > limit) | ((low == limit) & (index < limit_index))
    return tl.where(inside, low, limit), tl.where(inside, index, limit_index)


@triton.jit
def half_nats(
    fusion, values, places, row, size, top, limit, limit_index, need, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`bracket` of the masses inside a limit, by one pass: (key of n, key of n - 1, W_n, W_n-1)."""
    j = tl.arange(0, THRESHOLDS)
    keys = tl.where(j < THRESHOLDS - 1, ordered_key(top - 0.5 * (j + 1)), BOTTOM).to(tl.int64)
    w = weights_from(fusion, values, places, row, size, top, limit, limit_index, keys, True, LISTED, BLOCK)
    n = tl.minimum(tl.sum((w < need).to(tl.int32), 0), THRESHOLDS - 1)
    low = tl.sum(tl.where(j == n, keys, 0), 0)
    high = tl.where(n > 0, tl.sum(tl.where(j == n - 1, keys, 0), 0), ordered_key(top).to(tl.int64) + 1)
    return low, high, tl.sum(tl.where(j == n, w, 0.0), 0), tl.sum(tl.where(j == n - 1, w, 0.0), 0)


@triton.jit
def row_cut(
    fusion, values, places, row, size, top, top_p, need, low, high, w_low, w_high,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, index) of the end of the prefix that the filters keep of the row, or of its list."""
    limit, limit_index = row * 0 + LOWEST, (row * 0 + NO_INDEX).to(tl.int32)
    above = w_high * 0
    if LISTED and not TOP_K:
        above = w_high
    limit, limit_index = prefix_end(
        fusion, values, places, row, size, top, limit, limit_index, need, low, high, w_low, w_high, above, not TOP_K,
        LISTED, BLOCK,
    )  # fmt: skip
    if TOP_K and TOP_P:
        lowest = tl.zeros((THRESHOLDS,), tl.int64) + LOWEST
        w = weights_from(fusion, values, places, row, size, top, limit, limit_index, lowest, True, LISTED, BLOCK)
        need = nucleus_need(tl.max(w, 0), top_p)
        low, high, w_low, w_high = half_nats(
            fusion, values, places, row, size, top, limit, limit_index, need, LISTED, BLOCK
        )
        limit, limit_index = prefix_end(
            fusion, values, places, row, size, top, limit, limit_index, need, low, high, w_low, w_high, above, True,
            LISTED, BLOCK,
        )  # fmt: skip
    return limit, limit_index


@triton.jit
def _cut_kernel(
    fusion, vocab, tiles, i_partial, i_levels, values, places, top_k, top_p: tl.float64, o_value, o_index,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, total, _, _ = merge_sums(i_partial, row, tiles, TILES)
    value, index = top * 0 - INF, (row * 0 + NO_INDEX).to(tl.int32)
    if tl.abs(top) < INF:  # otherwise nothing to filter, or NaN
        need = first_need(total, top_k, top_p, TOP_K)
        n, low, high, w_low, w_high = bracket(i_levels, row, tiles, top, need, not TOP_K, TILES)
        size = tl.sum(list_sizes(i_levels, row, tiles, n, TOP_K, TILES), 0)
        if size <= LIST:
            limit, index = row_cut(
                fusion, values, places, row, size, top, top_p, need, low, high, w_low, w_high, TOP_K, TOP_P, True, BLOCK
            )
        else:
            limit, index = row_cut(
                fusion, values, places, row, vocab, top, top_p, need, low, high, w_low, w_high, TOP_K, TOP_P, False,
                BLOCK,
            )  # fmt: skip
        value = tl.where(limit == LOWEST, -INF, key_value(limit))
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
    kind, by_count = dtype(partial, "int32"), 0 < top_k < vocab_size
    value, index = partial.new_empty((rows,)), partial.new_empty((rows,), dtype=kind)
    found = listed(fusion, vocab_size, partial, tiles, kind, top_k, float(top_p), by_count)
    launch(
        _cut_kernel, rows, partial, fusion, vocab_size, tiles, partial, *found, top_k, float(top_p), value, index,
        TOP_K=by_count, TOP_P=top_p < 1.0, TILES=next_power(tiles), BLOCK=1024, num_warps=8,
    )  # fmt: skip
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
