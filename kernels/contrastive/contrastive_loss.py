"""Contrastive losses on a GPU: scores tile by tile, [M, N] never whole.

A first sweep gives (max, sum) of every tile's rows, for clip of its columns too, which are merged; a second makes the
scores again and writes dz of a chunk of rows (at most SCRATCH bytes) in the operands' dtype, and the library's products
dx = scale dz y, dy = scale dz^T x spend it. siglip has no first sweep. Floor: M N d multiply-adds a product, 4 products
(siglip 3), and dz written once and read twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, refuse_double

#: Bytes of dz that exist at a time.
SCRATCH = 1 << 30
BLOCK_M = 64


@triton.jit
def _score_tile(
    x, x_stride, y, y_stride, width, rows, row_mask, cols, col_mask,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """x_i . y_j, float32 [BLOCK_M, BLOCK_N]; 0 where masked."""
    raw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=row_mask[:, None] & (k[None, :] < width), other=0.0)
        b = tl.load(y + cols[None, :] * y_stride + k[:, None], mask=col_mask[None, :] & (k[:, None] < width), other=0.0)
        if DOT_F32:
            a, b = a.to(tl.float32), b.to(tl.float32)
        raw = tl.dot(a, b, raw, input_precision="ieee")
    return raw


@triton.jit(do_not_specialize=["first"])
def _statistics_kernel(
    x, x_stride, y, y_stride, count, columns, width, blocks, i_scale, i_bias, labels, column_labels, first,
    o_row_max, o_row_sum, o_column_max, o_column_sum, o_own, o_same, o_count,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, block = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64)
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < count, cols < columns
    raw = _score_tile(
        x, x_stride, y, y_stride, width, rows, row_mask, cols, col_mask, BLOCK_M, BLOCK_N, BLOCK_K, DOT_F32
    )
    z = raw * tl.load(i_scale).to(tl.float32)
    if i_bias is not None:
        z += tl.load(i_bias).to(tl.float32)
    inside = row_mask[:, None] & col_mask[None, :]
    own = cols[None, :] == (first + rows)[:, None]
    here = row_mask & (first + rows >= tile * BLOCK_N) & (first + rows < tile * BLOCK_N + BLOCK_N)
    tl.store(o_own + rows, tl.sum(tl.where(own, z, 0.0), 1), mask=here)
    if labels is not None:
        label = tl.load(labels + rows, mask=row_mask, other=0)
        other = tl.load(column_labels + cols, mask=col_mask, other=0)
        same = (label[:, None] == other[None, :]) & inside & (own == 0)
        tl.store(o_same + tile * count + rows, tl.sum(tl.where(same, z, 0.0), 1), mask=row_mask)
        tl.store(o_count + tile * count + rows, tl.sum(same.to(tl.int32), 1), mask=row_mask)
        inside &= own == 0
    z = tl.where(inside, z, -float("inf"))
    top = tl.max(z, 1)
    total = tl.sum(tl.exp(z - tl.where(top > -float("inf"), top, 0.0)[:, None]), 1)
    tl.store(o_row_max + tile * count + rows, top, mask=row_mask)
    tl.store(o_row_sum + tile * count + rows, total, mask=row_mask)
    if o_column_max is not None:
        top = tl.max(z, 0)
        total = tl.sum(tl.exp(z - tl.where(top > -float("inf"), top, 0.0)[None, :]), 0)
        tl.store(o_column_max + block * columns + cols, top, mask=col_mask)
        tl.store(o_column_sum + block * columns + cols, total, mask=col_mask)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], accurate relative to itself."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["first", "start", "chunk", "blocks"])
def _gradient_kernel(
    x, x_stride, y, y_stride, count, columns, width, blocks, i_scale, i_bias, labels, column_labels, first,
    start, chunk, i_row_max, i_row_coef, i_row_share, i_column_max, i_column_coef, weight, o_grad, o_loss, o_sum,
    o_product, SIGMOID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """dz of rows [start, start + chunk), and of each row in each tile the sums of dz, dz raw and a sigmoid's losses."""
    pid = tl.program_id(0)
    tile, local = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, cols = start + local, tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = (local < chunk) & (rows < count), cols < columns
    raw = _score_tile(
        x, x_stride, y, y_stride, width, rows, row_mask, cols, col_mask, BLOCK_M, BLOCK_N, BLOCK_K, DOT_F32
    )
    z = raw * tl.load(i_scale).to(tl.float32)
    if i_bias is not None:
        z += tl.load(i_bias).to(tl.float32)
    inside = row_mask[:, None] & col_mask[None, :]
    own = cols[None, :] == (first + rows)[:, None]
    if SIGMOID:
        # of the own column softplus(-z) and -sigmoid(-z), which keep their digits where they are small
        signed = tl.where(own, -z, z)
        e = tl.exp(-tl.abs(signed))
        # a maximum that keeps NaN
        loss = tl.where(inside, tl.where(signed < 0, 0.0, signed) + _log1p(e), 0.0)
        tl.store(o_loss + tile * count + rows, tl.sum(loss, 1), mask=row_mask)
        g = tl.where(signed > 0, 1.0, e) / (1.0 + e) * weight
        g = tl.where(own, -g, g)
    else:
        top = tl.load(i_row_max + rows, mask=row_mask, other=0.0)
        coef = tl.load(i_row_coef + rows, mask=row_mask, other=0.0)
        # as the statistics do, and so that scores are rounded before their largest is taken from them: an fma would
        # leave a rounding error of the score where 0 belongs
        z = tl.where(inside, z, -float("inf"))
        if labels is not None:
            z = tl.where(own, -float("inf"), z)
        g = coef[:, None] * tl.exp(z - top[:, None])
        if i_column_max is not None:
            top = tl.load(i_column_max + cols, mask=col_mask, other=0.0)
            coef = tl.load(i_column_coef + cols, mask=col_mask, other=0.0)
            g += coef[None, :] * tl.exp(z - top[None, :])
        if labels is not None:
            label = tl.load(labels + rows, mask=row_mask, other=0)
            other = tl.load(column_labels + cols, mask=col_mask, other=0)
            share = tl.load(i_row_share + rows, mask=row_mask, other=0.0)
            g -= tl.where((label[:, None] == other[None, :]) & (own == 0), share[:, None], 0.0)
        else:
            g -= tl.where(own, weight, 0.0)
    g = tl.where(inside, g, 0.0)
    tl.store(o_sum + tile * count + rows, tl.sum(g, 1), mask=row_mask)
    tl.store(o_product + tile * count + rows, tl.sum(g * raw, 1), mask=row_mask)
    tl.store(o_grad + local[:, None] * columns + cols[None, :], g.to(o_grad.dtype.element_ty), mask=inside)


def config(x: Any) -> dict[str, Any]:
    """Tile sizes; for float32, whose product is made in registers, half. The interpreter's dot takes float32 only."""
    wide = "float32" in str(x.dtype)
    on_cpu = getattr(x, "device", None) is not None and x.device.type == "cpu"
    sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": 64 if wide else 128, "BLOCK_K": 32 if wide else 64}
    return {**sizes, "DOT_F32": on_cpu, "num_warps": 8}


def supports_contrastive_loss(x: Any, y: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return refuse_double(x) if y is None else refuse_double(x, y)


class _Scores:
    """What all kernels of a call take, and its statistics."""

    def __init__(
        self, x: Any, y: Any, scale: Any, bias: Any, labels: Any, column_labels: Any, kind: str, first: int
    ) -> None:
        self.x, self.y, self.scale, self.kind = x, y, scale, kind
        self.rows, self.columns = x.shape[0], y.shape[0]
        self.single, self.options = dtype(x, "float32"), config(x)
        self.tiles = cdiv(self.columns, self.options["BLOCK_N"])
        self.head = (x, x.stride(0), y, y.stride(0), self.rows, self.columns, x.shape[1])
        self.tail = (scale, bias, labels, column_labels, first)

    def parts(self, tiles: int, size: int, kind: str = "float32") -> Any:
        """[tiles, size] for every tile's sums."""
        return self.x.new_empty((tiles, size), dtype=dtype(self.x, kind))

    def statistics(self) -> tuple[Any, ...]:
        """(max, sum) of the tiles' rows and columns, own scores, and sums and counts of scores of the same label."""
        blocks, rows, tiles = cdiv(self.rows, BLOCK_M), self.rows, self.tiles
        row = self.parts(tiles, rows), self.parts(tiles, rows)
        column: tuple[Any, Any] = (None, None)
        if self.kind == "clip":
            column = self.parts(blocks, self.columns), self.parts(blocks, self.columns)
        own = self.x.new_empty((rows,), dtype=self.single)
        same: tuple[Any, Any] = (None, None)
        if self.kind == "supcon":
            same = self.parts(tiles, rows), self.parts(tiles, rows, "int32")
        launch(
            _statistics_kernel, blocks * tiles, self.x, *self.head, blocks, *self.tail, *row, *column, own, *same,
            **self.options,
        )  # fmt: skip
        return row, column, own, same

    def gradient(self, start: int, weights: tuple[Any, ...], weight: float, grad: Any, loss: Any, sums: Any) -> None:
        """dz of rows [start, start + len(grad)) into ``grad``."""
        blocks = cdiv(grad.shape[0], BLOCK_M)
        launch(
            _gradient_kernel, blocks * self.tiles, self.x, *self.head, blocks, *self.tail, start, grad.shape[0],
            *weights, weight, grad, loss, *sums, SIGMOID=self.kind == "siglip", **self.options,
        )  # fmt: skip


def _merged(parts: tuple[Any, Any]) -> tuple[Any, Any]:
    """(max, sum of exp(z - max)) of all tiles; a maximum of -inf counts as the lowest finite number."""
    top = parts[0].amax(0).clamp(min=-3e38)
    return top, (parts[1] * (parts[0] - top).exp()).sum(0)


def _chunks(rows: int, columns: int, size: int) -> list[tuple[int, int]]:
    """(first, rows) of chunks whose dz fit the scratch, a multiple of BLOCK_M but the last."""
    most = max(BLOCK_M, SCRATCH // max(columns * size, 1) // BLOCK_M * BLOCK_M)
    return [(start, min(most, rows - start)) for start in range(0, rows, most)]


def launch_contrastive_loss(
    x: Any, y: Any, scale: Any, bias: Any, labels: Any, column_labels: Any, kind: str, first: int, need_x: bool,
    need_y: bool, need_scale: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `contrastive_loss` -> its results."""
    of_self = y is None
    y, column_labels = (x, labels) if of_self else (y, column_labels)
    work = _Scores(x, y, scale, bias, labels, column_labels, kind, first)
    rows, single = max(work.rows, 1), work.single
    loss = x.new_zeros((), dtype=single)
    weights: tuple[Any, ...] = (None,) * 5
    positives = x.new_empty((0,), dtype=dtype(x, "int64"))
    losses = work.parts(work.tiles, work.rows) if kind == "siglip" else None
    if kind != "siglip" and work.rows:
        loss, positives, weights = _softmax_loss(work)
    any_gradient = need_x or need_y or need_scale
    sums = work.parts(work.tiles, work.rows), work.parts(work.tiles, work.rows)
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=single)
    dy = y.new_zeros(y.shape if need_y or (of_self and need_x) else (0,), dtype=single)
    for start, size in _chunks(work.rows, work.columns, x.element_size()) if any_gradient or losses is not None else []:
        grad = x.new_empty((size, work.columns))
        work.gradient(start, weights, 1.0 / rows, grad, losses, sums)
        part = slice(start, start + size)
        if need_x:
            dx[part] = grad.matmul(y).float() * scale.float()
        if dy.numel():
            dy += grad.t().matmul(x[part]).float() * scale.float()
    if losses is not None:
        loss = losses.sum() / rows
    if of_self and need_x:
        dx, dy = dx + dy, dy.new_empty((0,))
    none = loss.new_empty((0,))
    scalars = (sums[1].sum(), sums[0].sum()) if need_scale else (none, none)
    return loss, positives, dx.to(x.dtype), dy.to(y.dtype), *scalars


def _softmax_loss(work: _Scores) -> tuple[Any, Any, tuple[Any, ...]]:
    """The loss, the positives of each row for supcon, and what the gradient kernel takes of rows and columns."""
    rows = work.rows
    row, column, toward, (same, count) = work.statistics()
    positives, weight, share = toward.new_empty((0,), dtype=dtype(toward, "int64")), 1.0 / rows, None
    if same is not None:
        positives = count.sum(0)
        toward = same.sum(0) / positives.clamp(min=1)
        weight = (positives > 0) / rows
        share = weight / positives.clamp(min=1)
    top, total = _merged(row)
    across = (top - toward) + total.log()
    if column[0] is None:
        each = across / rows if same is None else (across / rows).masked_fill(positives == 0, 0.0)
        coef = weight / total if same is None else (weight / total).masked_fill(positives == 0, 0.0)
        return each.sum(), positives, (top, coef, share, None, None)
    column_top, column_total = _merged(column)
    down = (column_top - toward) + column_total.log()
    halves = (0.5 * weight / total, 0.5 * weight / column_total)
    return (across + down).sum() * (0.5 * weight), positives, (top, halves[0], None, column_top, halves[1])


def aot_cases() -> list[AotCase]:
    """Both kernels of each kind at CLIP's batch: bf16, and supcon in fp32."""

    def run(kind: str, name: str, rows: int, columns: int, width: int) -> None:
        x, y = Meta((rows, width), name), Meta((columns, width), name)
        scale, bias = Meta((), "float32"), Meta((), "float32") if kind == "siglip" else None
        label = (Meta((rows,), "int64"), Meta((columns,), "int64")) if kind == "supcon" else (None, None)
        work = _Scores(x, y, scale, bias, *label, kind, 0)
        if kind != "siglip":
            work.statistics()
        row, column = Meta((rows,), "float32"), Meta((columns,), "float32")
        weights = (row, row, row if kind == "supcon" else None, *((column, column) if kind == "clip" else (None, None)))
        weights = (None,) * 5 if kind == "siglip" else weights
        parts = work.parts(work.tiles, rows)
        grad, loss = Meta((rows, columns), name), parts if kind == "siglip" else None
        work.gradient(0, weights, 1.0 / rows, grad, loss, (parts, parts))

    return [
        AotCase("bf16-clip-B32768", lambda: run("clip", "bfloat16", 32768, 32768, 512)),
        AotCase("bf16-siglip-B4096", lambda: run("siglip", "bfloat16", 4096, 32768, 768)),
        AotCase("bf16-infonce-B4096", lambda: run("infonce", "bfloat16", 4096, 32768, 768)),
        AotCase("fp32-supcon-B4096", lambda: run("supcon", "float32", 4096, 4096, 128)),
    ]
