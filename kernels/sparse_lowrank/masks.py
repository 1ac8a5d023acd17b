"""topk_mask and nm_mask: magnitudes |x|, a NaN as infinity, whose bits order like integers.

topk_mask: the k-th largest of a row by its digits of 4 bits from the top, 8 rounds. In each, programs count the 16
digits of their tiles among those that agree in all higher bits, and one program a row adds the counts and picks the
digit in which the k-th lies. The counts of the last round also say how many ties stand in earlier tiles. No atomics.
Floor: scores read once, mask written once; here they are read nine times, from L2 where they fit.

nm_mask: a program takes whole groups, [groups, m] in registers; an entry's rank counts who goes before it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch, next_power, row_tile

BLOCK = 1024
BINS = tl.constexpr(16)
TILES = 256  # of a row, at most
ENTRIES = 1024  # of a program of nm_mask


@triton.jit
def _magnitudes(x, at, inside):
    """(key, is NaN) of float32 magnitudes: int32 in the same order; -1 where there is none."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    lost = (value != value) & inside
    size = tl.where(lost, INF, tl.abs(value))
    return tl.where(inside, size.to(tl.int32, bitcast=True), -1), lost


@triton.jit
def _count_kernel(x, prefix, o_counts, size, tiles, tile, shift, BLOCK: tl.constexpr):
    row, place = row_tile(tiles)
    wanted, bins = tl.load(prefix + row), tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, tile, BLOCK):
        cols = place.to(tl.int64) * tile + start + tl.arange(0, BLOCK)
        key, _ = _magnitudes(x, row * size + cols, cols < size)
        digit = tl.where((key >> shift >> 4) == wanted, (key >> shift) & 15, -1)
        counts += tl.sum((digit[None, :] == bins[:, None]).to(tl.int32), 1)
    tl.store(o_counts + (row * tiles + place) * BINS + bins, counts)


@triton.jit
def _choose_kernel(counts, prefix, left, tiles, k, FIRST: tl.constexpr, ALL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place, bins = tl.arange(0, ALL), tl.arange(0, BINS)
    found = tl.load(
        counts + (row * tiles + place[:, None]) * BINS + bins[None, :], mask=place[:, None] < tiles, other=0
    )  # fmt: skip
    count = tl.sum(found, 0)
    above = tl.sum(tl.where(bins[None, :] > bins[:, None], count[None, :], 0), 1)  # of each digit
    need = tl.load(left + row) if not FIRST else tl.maximum(k, 1)
    chosen = (above < need) & (above + count >= need)
    tl.store(prefix + row, (tl.load(prefix + row) << 4) | tl.sum(tl.where(chosen, bins, 0), 0))
    tl.store(left + row, need - tl.sum(tl.where(chosen, above, 0), 0))


@triton.jit
def _mask_kernel(
    x, prefix, left, counts, o_mask, o_nans, size, tiles, tile, ALL: tl.constexpr, NONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_tile(tiles)
    wanted, ties = tl.load(prefix + row), tl.load(left + row)
    every = tl.arange(0, ALL)
    earlier = tl.load(
        counts + (row * tiles + every) * BINS + (wanted & 15), mask=every < place, other=0
    )  # fmt: skip
    seen = tl.sum(earlier, 0)
    nans = 0
    for start in range(0, tile, BLOCK):
        cols = place.to(tl.int64) * tile + start + tl.arange(0, BLOCK)
        inside = cols < size
        key, lost = _magnitudes(x, row * size + cols, inside)
        equal = (key == wanted).to(tl.int32)
        taken = (equal > 0) & (tl.cumsum(equal, 0) + seen <= ties)
        kept = ((key > wanted) | taken) & (not NONE)
        tl.store(o_mask + row * size + cols, kept, mask=inside)
        seen += tl.sum(equal, 0)
        nans += tl.sum(lost.to(tl.int32), 0)
    tl.store(o_nans + row * tiles + place, nans)


@triton.jit
def _nm_kernel(x, o_mask, o_nans, groups, n, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    inside = (group < groups) & (i < M)
    key, lost = _magnitudes(x, group * M + i, inside)
    rank = tl.zeros((GROUPS, WIDTH), tl.int32)
    for j in tl.static_range(M):
        other, _ = _magnitudes(x, group * M + j, group < groups)
        rank += ((other > key) | ((other == key) & (j < i))).to(tl.int32)
    tl.store(o_mask + group * M + i, rank < n, mask=inside)
    tl.store(o_nans + tl.program_id(0), tl.sum(tl.sum(lost.to(tl.int32), 1), 0))


def launch_topk_mask(scores: Any, k: int) -> tuple[Any, Any]:
    """Arguments of `topk_mask` -> (mask, nans)."""
    rows, size = scores.shape
    tile = cdiv(cdiv(max(size, 1), TILES), BLOCK) * BLOCK
    tiles = cdiv(size, tile)
    width = next_power(tiles)
    mask = scores.new_empty((rows, size), dtype=dtype(scores, "bool"))
    whole = dtype(scores, "int32")
    counts, nans = scores.new_empty((rows, tiles, 16), dtype=whole), scores.new_zeros((rows, tiles), dtype=whole)
    prefix, left = scores.new_zeros((rows,), dtype=whole), scores.new_empty((rows,), dtype=whole)
    for shift in range(28, -1, -4):
        launch(_count_kernel, rows * tiles, scores, scores, prefix, counts, size, tiles, tile, shift, BLOCK=BLOCK)
        launch(
            _choose_kernel, rows if size else 0, scores, counts, prefix, left, tiles, k, FIRST=shift == 28, ALL=width
        )  # fmt: skip
    launch(
        _mask_kernel, rows * tiles, scores, scores, prefix, left, counts, mask, nans, size, tiles, tile, ALL=width,
        NONE=k == 0, BLOCK=BLOCK,
    )  # fmt: skip
    return mask, nans.sum()


def launch_nm_mask(scores: Any, n: int, m: int) -> tuple[Any, Any]:
    """Arguments of `nm_mask` -> (mask, nans)."""
    rows, size = scores.shape
    groups, width = rows * size // m, next_power(m)
    each = ENTRIES // width
    programs = cdiv(groups, each)
    mask = scores.new_empty((rows, size), dtype=dtype(scores, "bool"))
    nans = scores.new_zeros((programs,), dtype=dtype(scores, "int32"))
    launch(_nm_kernel, programs, scores, scores, mask, nans, groups, n, M=m, WIDTH=width, GROUPS=each)
    return mask, nans.sum()


def aot_cases() -> list[AotCase]:
    """A global mask of a large model; rows in bf16; groups of four and of eight."""
    return [
        AotCase("fp32-global", lambda: launch_topk_mask(Meta((1, 1 << 27), "float32"), 1 << 24)),
        AotCase("bf16-rows", lambda: launch_topk_mask(Meta((4096, 4096), "bfloat16"), 1024)),
        AotCase("fp32-2of4", lambda: launch_nm_mask(Meta((4096, 4096), "float32"), 2, 4)),
        AotCase("bf16-4of8", lambda: launch_nm_mask(Meta((4096, 4096), "bfloat16"), 4, 8)),
    ]
