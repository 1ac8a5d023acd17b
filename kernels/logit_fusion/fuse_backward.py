"""The gradient of fuse_logits, fused_log_softmax and fused_stats.

    g_v = grad_v + P_v (a + b z_v - [subtract] sum_u grad_u) + sum_j c_j [v = index_j],   P = softmax(z)
    dz = g / temperature, 0 where z = -inf,   dw_k = sum_v dz_v d_k,v,   dtemperature = -sum_v dz_v z_v

One program a tile of a row recomputes z and writes dz; the row sum of grad and the parameter gradients go through
per-tile partials and one small launch each, no atomics. Floor: K + 2 logit tensors and grad read, dz written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch, next_power, row_tile, tile_width
from .filters import plausible_fusion
from .fusion import load_fused, load_shift, load_temperature, one_expert, pairs, refuse_fusion


@triton.jit
def load_grad(grad, row, cols, mask):
    """Columns of one row of the upstream gradient (tensor, row stride, column stride), 0 in masked lanes."""
    return tl.load(grad[0] + row * grad[1] + cols.to(tl.int64) * grad[2], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_value(vector, row):
    """One entry of a row vector (tensor, stride)."""
    return tl.load(vector[0] + row * vector[1]).to(tl.float32)


@triton.jit
def _row_sum_kernel(grad, vocab, tiles, o_partial, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_partial + row * tiles + tile, tl.sum(load_grad(grad, row, cols, cols < vocab), 0))


@triton.jit
def masked_dot(a, b, z):
    """sum a b over the columns with z > -inf; float64, because signs cancel over a whole vocabulary."""
    return tl.sum(tl.where(z == -INF, 0.0, a.to(tl.float64) * b.to(tl.float64)), 0)


@triton.jit
def _gradient_kernel(
    fusion, vocab, tiles, grad, lse, row_a, row_b, index, coef, i_sums, o_dz, o_partial,
    J: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocab
    z = load_fused(fusion, row, cols, mask)  # [BLOCK]
    g = tl.zeros((BLOCK,), tl.float32)
    if grad is not None:
        g += load_grad(grad, row, cols, mask)
    scale = tl.zeros((BLOCK,), tl.float32)
    if row_a is not None:
        scale += row_value(row_a, row)
    if row_b is not None:
        scale += row_value(row_b, row) * tl.where(z == -INF, 0.0, z)
    if i_sums is not None:
        i = tl.arange(0, TILES)
        scale -= tl.sum(tl.load(i_sums + row * tiles + i, mask=i < tiles, other=0.0), 0)
    if (row_a is not None) or (row_b is not None) or (i_sums is not None):
        g += tl.exp(z - row_value(lse, row)) * scale
    for j in tl.static_range(J):
        at = tl.load(index[0] + row * index[1] + j * index[2])
        g += tl.where(cols == at, tl.load(coef[0] + row * coef[1] + j * coef[2]).to(tl.float32), 0.0)
    dz = tl.where(z == -INF, 0.0, g) / load_temperature(fusion, row)
    tl.store(o_dz + row * vocab + cols, dz.to(o_dz.dtype.element_ty), mask=mask)
    if o_partial is not None:
        count: tl.constexpr = len(fusion[2])
        out = o_partial + row * (count + 1) * tiles + tile
        for k in tl.static_range(count):
            d = load_shift(fusion, k, row, cols, mask)
            tl.store(out + k * tiles, masked_dot(dz, d, z))
        tl.store(out + count * tiles, -masked_dot(dz, z, z))


@triton.jit
def _merge_parameters_kernel(tiles, i_partial, o_weights, o_temperature, COUNT: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    for k in tl.static_range(COUNT + 1):
        part = tl.load(i_partial + (row * (COUNT + 1) + k) * tiles + i, mask=i < tiles, other=0.0)
        total = tl.sum(part, 0).to(tl.float32)
        if k < COUNT:
            tl.store(o_weights + row * COUNT + k, total)
        else:
            tl.store(o_temperature + row, total)


def with_strides(tensor: Any) -> tuple[Any, ...] | None:
    """(tensor, strides...) as the kernels take it; None stays None."""
    return None if tensor is None else (tensor, *tensor.stride())


def launch_fuse_backward(
    given: Any, grad: Any, lse: Any, row_a: Any, row_b: Any, index: Any, index_coef: Any, subtract_row_sum: bool,
    need_params: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Arguments of `fuse_backward` -> (dz, dweights, dtemperature)."""
    base, vocab_size, count = given.base, given.vocab_size, len(given.experts)
    rows, block = base.shape[0], tile_width(vocab_size)
    tiles = cdiv(vocab_size, block)
    fusion = plausible_fusion(given)
    f32 = dtype(base, "float32")
    dz = base.new_empty((rows, vocab_size))
    sums = partial = None
    if subtract_row_sum and grad is not None:
        sums = base.new_empty((rows, tiles), dtype=f32)
        launch(_row_sum_kernel, rows * tiles, base, with_strides(grad), vocab_size, tiles, sums, BLOCK=block)
    if need_params:
        partial = base.new_empty((rows, count + 1, tiles), dtype=dtype(base, "float64"))
    launch(
        _gradient_kernel, rows * tiles, base, fusion, vocab_size, tiles, with_strides(grad), with_strides(lse),
        with_strides(row_a), with_strides(row_b), with_strides(index), with_strides(index_coef), sums, dz, partial,
        J=0 if index is None else index.shape[1], TILES=next_power(tiles), BLOCK=block,
    )
    if not need_params:
        return dz, base.new_empty((0,), dtype=f32), base.new_empty((0,), dtype=f32)
    dweights, dheat = base.new_empty((rows, count), dtype=f32), base.new_empty((rows,), dtype=f32)
    launch(
        _merge_parameters_kernel, rows, base, tiles, partial, dweights, dheat, COUNT=count, TILES=next_power(tiles)
    )
    return dz, dweights, dheat


supports_fuse_backward = refuse_fusion


def aot_cases() -> list[AotCase]:
    """Backward of log-softmax in bf16, of the statistics with parameter gradients in fp32."""

    def log_softmax() -> None:
        base, expert, anti, grad = (Meta((8, 151936), "bfloat16") for _ in range(4))
        row = Meta((8,), "float32")
        given = one_expert(base, expert, anti)
        launch_fuse_backward(given, grad, row, row, None, None, None, True, False)

    def stats() -> None:
        base, *rest = (Meta((8, 32000), "float32") for _ in range(5))
        row, index, coef = Meta((8,), "float32"), Meta((8, 2), "int64"), Meta((8, 2), "float32")
        given = pairs(base, rest, Meta((8, 2), "float32"), temperature=row)
        launch_fuse_backward(given, None, row, row, row, index, coef, False, True)

    return [AotCase("bf16-k1-v151936-log-softmax", log_softmax), AotCase("fp32-k2-v32000-stats", stats)]
