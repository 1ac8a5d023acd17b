"""The sparse part S of W = s B A + S as dense tiles in registers: what every kernel of the family shares.

A tile is BLOCK_O rows of S by BLOCK_I columns. The q-th value of every row is placed by comparing its column with the
tile's: BLOCK_O x BLOCK_I compares and selects a value of the fullest row, no scatter, no atomics. A tensor core then
multiplies the tile as if it were dense, which on a GPU is cheaper than gathering on the scalar units.

``balanced``: the q-th value of a row in a block of columns stands at a place known by arithmetic, and every row has the
same number. ``csr``: `_segments_kernel` first writes where in its row each tile of columns begins, int32
[O, tiles + 1]: one pass over the columns, 4 O I / BLOCK_I bytes of scratch a call (2.8 MB at 11008 x 4096 in bfloat16).
No transposed index is needed for x S: tiles of S are formed by rows whichever way they are multiplied.

Products are computed in the dtype of x (weights of another dtype are rounded to it, as under autocast), sums in
float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import INTERPRETED, AotCase, Group, Meta, cdiv, dtype, launch, next_power
from ..logit_fusion.fusion import number

_DOT = {"torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16}


class Place(NamedTuple):
    """A support as kernels take it: ``tensors`` is (cols, segments, rows, columns, tiles, last)."""

    tensors: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        """O."""
        return int(self.tensors[2])

    @property
    def columns(self) -> int:
        """I."""
        return int(self.tensors[3])

    @property
    def tiles(self) -> int:
        """Tiles of columns."""
        return int(self.tensors[4])

    def first_column(self, tile: int) -> int:
        """First column of a tile, at most I."""
        block, subs, width = (self.options[n] for n in ("BLOCK", "SUBS", "BLOCK_I"))
        start = tile // subs * block + tile % subs * width if block else tile * width
        return min(start, self.columns)


@triton.jit
def tile_columns(support, tile, BLOCK: tl.constexpr, SUBS: tl.constexpr, BLOCK_I: tl.constexpr):
    """Columns of a tile [BLOCK_I], which of them exist, and what to subtract from a stored column."""
    c = tl.arange(0, BLOCK_I)
    if BLOCK == 0:
        origin = tile * BLOCK_I
        col = origin + c
        mask = col < support[3]
    else:
        origin = (tile % SUBS) * BLOCK_I
        col = (tile // SUBS) * BLOCK + origin + c
        mask = (origin + c < BLOCK) & (col < support[3])
    return col, mask, origin


@triton.jit
def span(support, row, row_mask, tile, BLOCK: tl.constexpr, PER_BLOCK: tl.constexpr, SUBS: tl.constexpr):
    """Of each row in a tile: its first value and their number; and the largest number."""
    if BLOCK == 0:
        at = support[1] + row.to(tl.int64) * (support[4] + 1) + tile
        first = tl.load(at, mask=row_mask, other=0)
        count = tl.load(at + 1, mask=row_mask, other=0) - first
        return first, count, tl.max(count, 0)
    else:
        wide = tile // SUBS
        most = tl.where((wide + 1) * BLOCK < support[3], PER_BLOCK, support[5])
        first = wide * support[2] * PER_BLOCK + row * most
        return first, tl.where(row_mask, most, 0), most


@triton.jit
def sparse_tile(
    support,
    values,
    row,
    row_mask,
    tile,
    BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    FLIP: tl.constexpr,
    DOT: tl.constexpr,
):
    """S of some rows and one tile of columns, [BLOCK_O, BLOCK_I] (transposed with FLIP), in DOT."""
    _, _, origin = tile_columns(support, tile, BLOCK, SUBS, BLOCK_I)
    first, count, most = span(support, row, row_mask, tile, BLOCK, PER_BLOCK, SUBS)
    c = tl.arange(0, BLOCK_I)
    if FLIP:
        found = tl.zeros((BLOCK_I, BLOCK_O), DOT)
    else:
        found = tl.zeros((BLOCK_O, BLOCK_I), DOT)
    at = tl.load(support[0] + first, mask=count > 0, other=0).to(tl.int32) - origin
    v = tl.load(values + first, mask=count > 0, other=0.0).to(DOT)
    for q in range(most):
        at = tl.where(q < count, at, -1)
        more = q + 1 < count  # the next value is on its way while this one is placed
        later = tl.load(support[0] + first + q + 1, mask=more, other=0).to(tl.int32) - origin
        w = tl.load(values + first + q + 1, mask=more, other=0.0).to(DOT)
        if FLIP:
            found = tl.where(at[None, :] == c[:, None], v[None, :], found)
        else:
            found = tl.where(at[:, None] == c[None, :], v[:, None], found)
        at, v = later, w
    return found


@triton.jit
def scale_of(scale, scale_value):
    """The scale as a float32 scalar: of a tensor of one element, or a number."""
    if scale is not None:
        return tl.load(scale).to(tl.float32)
    else:
        return number(scale_value)


@triton.jit
def _segments_kernel(
    row_ptr, cols, segments, rows, tiles, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """segments[row, t] = first value of the row at or beyond column t BLOCK_I.

    Each value, and an imaginary one behind the row's last, writes the tiles between its predecessor's and its own.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = row < rows
    first = tl.load(row_ptr + row, mask=mask, other=0)
    end = tl.load(row_ptr + row + 1, mask=mask, other=0)
    out = segments + row[:, None] * (tiles + 1)
    for start in range(0, tl.max(end - first, 0) + 1, BLOCK_K):
        k = first[:, None] + start + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_R, BLOCK_K]
        inside = mask[:, None] & (k <= end[:, None])
        stored, later = k < end[:, None], k > first[:, None]
        here = tl.load(cols + k, mask=inside & stored, other=0).to(tl.int32) // BLOCK_I
        here = tl.where(stored, here, tiles)
        before = tl.load(cols + k - 1, mask=inside & later, other=0).to(tl.int32) // BLOCK_I
        before = tl.where(later, before, -1)
        gap = tl.where(inside, here - before, 0)
        for d in range(tl.max(tl.max(gap, 1), 0)):
            tl.store(out + before + 1 + d, k, mask=d < gap)


def dot_type(like: Any) -> Any:
    """The Triton dtype that products with ``like`` are computed in; the interpreter multiplies float32 only."""
    return tl.float32 if INTERPRETED.value else _DOT.get(str(like.dtype), tl.float32)


def large_tiles(like: Any) -> bool:
    """Whether tiles are those of the tensor cores. The interpreter takes them always: its time goes by their number."""
    return INTERPRETED.value or str(like.dtype) in _DOT


def tile_width(low: bool, block: int) -> int:
    """BLOCK_I. Narrow: the fullest row of a narrow csr tile has fewer values, and a tile costs fewer registers."""
    width = 64 if low else 32
    return max(16, min(next_power(block), width)) if block else width


def place(like: Any, support: Any) -> Place:
    """The support for kernels that compute in the dtype of ``like``; writes the segments of a csr one."""
    row_ptr, cols, rows, columns = support.row_ptr, support.cols, support.rows, support.columns
    block, per_block = support.block, support.per_block
    width = tile_width(large_tiles(like), block)
    if block:
        subs, blocks = cdiv(block, width), cdiv(columns, block)
        rest = columns - (blocks - 1) * block
        last = (2 * per_block * rest + block) // (2 * block) if blocks else 0  # round(per_block rest / block)
        options = {"BLOCK": block, "PER_BLOCK": per_block, "SUBS": subs, "BLOCK_I": width}
        return Place((cols, None, rows, columns, blocks * subs, last), options)
    tiles = cdiv(columns, width)
    segments = row_ptr.new_empty((rows, tiles + 1))
    launch(
        _segments_kernel, cdiv(rows, 16), row_ptr, row_ptr, cols, segments, rows, tiles,
        BLOCK_I=width, BLOCK_R=16, BLOCK_K=64,
    )  # fmt: skip
    return Place((cols, segments, rows, columns, tiles, 0), {"BLOCK": 0, "PER_BLOCK": 0, "SUBS": 1, "BLOCK_I": width})


def meta_support(rows: int, columns: int, density: float, block: int = 0) -> tuple[Any, int]:
    """A support and its number of values, for ahead-of-time cases."""
    per_block = round(density * block)
    nnz = rows * per_block * cdiv(columns, block) if block else int(density * rows * columns)
    row_ptr = Meta((0 if block else rows + 1,), "int32")
    cols = Meta((nnz,), "uint8" if block else "uint16")
    given = Group(row_ptr=row_ptr, cols=cols, plan=[], rows=rows, columns=columns, block=block, per_block=per_block)
    return given, nnz


def single(like: Any) -> Any:
    """float32, as ``like`` spells it."""
    return dtype(like, "float32")


def aot_cases() -> list[AotCase]:
    """The segments of a 7B layer."""
    return [AotCase("csr16", lambda: place(Meta((1,), "bfloat16"), meta_support(11008, 4096, 0.05)[0]))]
