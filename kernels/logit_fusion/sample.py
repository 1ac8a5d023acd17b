"""fused_sample: fuse, filter and draw one token a row.

    token = min {v kept : sum_{u <= v kept} exp(z_u - m) > uniform * sum_kept exp(z_u - m)},   logprob = z_token - lse

Without filters two launches: partials of every tile, then one program a row picks the tile by its mass and draws inside
that one tile. With top-k or top-p, filters.py finds the end of the kept prefix in between and a launch over tiles sums
what is kept. Prefix masses are float64; one uniform number a row, so the draw does not depend on the batch.
Floor: the K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, AotCase, Group, Meta, cdiv, dtype, launch, next_power, row_tile, safe, tile_width
from .filters import find_cut, least_distance, plausible_fusion
from .fusion import load_fused, load_temperature, one_expert, refuse_fusion
from .partials import log_probability, merge_sums, row_lse, tile_stats


@triton.jit
def kept_mass(z, top, cols, row, cut_value, cut_index, log_min_p):
    """exp(z - top) of the kept columns, 0 elsewhere; and which are kept."""
    keep = (z > -INF) & (z - top >= log_min_p)
    if cut_value is not None:
        value, index = tl.load(cut_value + row), tl.load(cut_index + row)
        keep = keep & ((z > value) | ((z == value) & (cols <= index)))
    return tl.where(keep, tl.exp(z - top), 0.0), keep


@triton.jit
def _kept_kernel(
    fusion, vocab, tiles, i_partial, cut_value, cut_index, log_min_p, o_kept, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    z = load_fused(fusion, row, cols, cols < vocab)  # [BLOCK]
    top, _, _, _ = merge_sums(i_partial, row, tiles, TILES)
    mass, keep = kept_mass(z, safe(top), cols, row, cut_value, cut_index, log_min_p)
    tl.store(o_kept + row * 2 * tiles + tile, tl.sum(mass, 0))
    tl.store(o_kept + row * 2 * tiles + tiles + tile, tl.sum(keep.to(tl.float32), 0))


@triton.jit
def choose(masses, i, uniform):
    """(first i whose cumulative mass exceeds uniform * total, mass in front of it, uniform * total), float64."""
    cumulative = tl.cumsum(masses.to(tl.float64), 0)
    goal = uniform * tl.max(cumulative, 0)
    last = tl.max(tl.where(masses > 0, i, 0), 0)
    chosen = tl.minimum(tl.min(tl.where((cumulative > goal) & (masses > 0), i, NO_INDEX), 0), last)
    return chosen, tl.sum(tl.where(i == chosen - 1, cumulative, 0.0), 0), goal


@triton.jit
def draw_in_tile(z, mass, cols, before, goal):
    """(token, its z): the first column where the cumulative mass exceeds the goal, the last with mass at the latest."""
    cumulative = tl.cumsum(mass.to(tl.float64), 0) + before
    last = tl.max(tl.where(mass > 0, cols, -1), 0)
    token = tl.minimum(tl.min(tl.where((cumulative > goal) & (mass > 0), cols, NO_INDEX), 0), last)
    return token, tl.max(tl.where(cols == token, z, -INF), 0)


@triton.jit
def _draw_kernel(
    fusion, vocab, tiles, i_partial, i_index, i_kept, cut_value, cut_index, log_min_p, uniform, uniform_stride,
    o_token, o_logprob, o_lse, o_kept, TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    top, total, tops, masses = merge_sums(i_partial, row, tiles, TILES)
    lse = row_lse(top, total)
    counts = i_partial + row * 4 * tiles + 3 * tiles
    if i_kept is not None:
        masses = tl.load(i_kept + row * 2 * tiles + i, mask=i < tiles, other=0.0)
        counts = i_kept + row * 2 * tiles + tiles
    kept = tl.sum(tl.load(counts + i, mask=i < tiles, other=0.0).to(tl.int32), 0)
    tile, before, goal = choose(masses, i, tl.load(uniform + row * uniform_stride).to(tl.float64))
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    z = load_fused(fusion, row, cols, cols < vocab)  # [BLOCK]
    mass, _ = kept_mass(z, safe(top), cols, row, cut_value, cut_index, log_min_p)
    token, z_token = draw_in_tile(z, mass, cols, before, goal)
    if load_temperature(fusion, row) == 0.0:
        firsts = tl.load(i_index + row * tiles + i, mask=i < tiles, other=NO_INDEX)
        token, z_token = tl.min(tl.where(tops == top, firsts, NO_INDEX), 0), top
        kept = kept * 0 + 1
    fine = tl.abs(lse) < INF
    tl.store(o_token + row, tl.where(fine, token, -1).to(tl.int64))
    tl.store(o_logprob + row, tl.where(fine, log_probability(z_token, top, total), float("nan")))
    tl.store(o_lse + row, lse)
    tl.store(o_kept + row, tl.where(fine, kept, 0))


def draw(fusion: tuple[Any, ...], vocab_size: int, how: Any) -> tuple[Any, Any, Any, Any]:
    """(token, logprob, lse, kept) of the rows of ``fusion``."""
    uniform, top_k, top_p, min_p = how.uniform, how.top_k, how.top_p, how.min_p
    base, block = fusion[0], tile_width(vocab_size)
    rows, tiles = base.shape[0], cdiv(vocab_size, block)
    shape = {"TILES": next_power(tiles), "BLOCK": block}
    partial, index, _ = tile_stats(fusion, rows, vocab_size)
    level = least_distance(min_p)
    cut, kept = (None, None), None
    if 0 < top_k < vocab_size or top_p < 1.0:
        cut = find_cut(fusion, vocab_size, partial, tiles, top_k, top_p)
    if cut[0] is not None or min_p > 0:
        kept = partial.new_empty((rows, 2, tiles))
        launch(_kept_kernel, rows * tiles, base, fusion, vocab_size, tiles, partial, *cut, level, kept, **shape)
    token = base.new_empty((rows,), dtype=dtype(base, "int64"))
    logprob, lse = partial.new_empty((rows,)), partial.new_empty((rows,))
    count = base.new_empty((rows,), dtype=dtype(base, "int32"))
    launch(
        _draw_kernel, rows, base, fusion, vocab_size, tiles, partial, index, kept, *cut, level, uniform,
        uniform.stride(0), token, logprob, lse, count, **shape,
    )
    return token, logprob, lse, count


def launch_fused_sample(given: Any, how: Any) -> tuple[Any, Any, Any, Any]:
    """Arguments of `fused_sample` -> (token, logprob, lse, kept)."""
    return draw(plausible_fusion(given), given.vocab_size, how)


supports_fused_sample = refuse_fusion


def aot_cases() -> list[AotCase]:
    """Plain draws in bf16, every filter in bf16 and fp32."""

    def case(kind: str, vocab_size: int, top_k: int, top_p: float, min_p: float) -> None:
        base, expert, anti = (Meta((8, vocab_size), kind) for _ in range(3))
        how = Group(uniform=Meta((8,), "float32"), top_k=top_k, top_p=top_p, min_p=min_p)
        launch_fused_sample(one_expert(base, expert, anti, temperature_value=0.7), how)

    return [
        AotCase("bf16-v151936", lambda: case("bfloat16", 151936, 0, 1.0, 0.0)),
        AotCase("bf16-v151936-filters", lambda: case("bfloat16", 151936, 50, 0.9, 0.05)),
        AotCase("fp32-v32000-filters", lambda: case("float32", 32000, 50, 0.9, 0.05)),
    ]
