"""lse, max, argmax, entropy and target log-probability of the fused distribution.

    lse = m + log S,   H = log S - E / S,   with the row's m, S, E merged from the partials of partials.py

One program a tile of a row writes partials; one program a row merges them. Two launches, one read.
Floor: the K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, AotCase, Meta, dtype, launch, next_power, safe
from .filters import plausible_fusion
from .fusion import load_fused, one_expert, pairs, refuse_fusion
from .partials import first_index, log_probability, merge_sums, row_lse, tile_stats


@triton.jit
def _merge_stats_kernel(
    fusion, vocab, tiles, i_partial, i_index, o_lse, o_max, o_argmax, o_entropy, targets, target_stride, o_logp,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top, total, tops, sums = merge_sums(i_partial, row, tiles, TILES)
    lse = row_lse(top, total)
    tl.store(o_lse + row, lse)
    i = tl.arange(0, TILES)
    firsts = tl.load(i_index + row * tiles + i, mask=i < tiles, other=NO_INDEX)
    first = first_index(tops, top, firsts)
    # weighted sums of z - row max; tiles of -inf alone have no mass and no reference line
    moments = tl.load(i_partial + row * 4 * tiles + 2 * tiles + i, mask=i < tiles, other=0.0)
    moments = moments * tl.exp(safe(tops) - safe(top)) + sums * (safe(tops) - safe(top))
    tl.store(o_max + row, top)
    tl.store(o_argmax + row, first.to(tl.int64))
    tl.store(o_entropy + row, (tl.log(total.to(tl.float64)) - tl.sum(moments.to(tl.float64), 0) / total).to(tl.float32))
    if targets is not None:
        target = tl.load(targets + row * target_stride)
        lanes = tl.arange(0, 16)
        z = load_fused(fusion, row, target + lanes, lanes < tl.where(target < 0, 0, tl.minimum(vocab - target, 1)))
        tl.store(o_logp + row, log_probability(tl.max(tl.where(z == z, z, -INF), 0), top, total))


def launch_fused_stats(given: Any, targets: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Arguments of `fused_stats` -> (lse, max, argmax, entropy, target_logp)."""
    base, vocab_size = given.base, given.vocab_size
    rows = base.shape[0]
    fusion = plausible_fusion(given)
    partial, index, tiles = tile_stats(fusion, rows, vocab_size)
    lse, top, entropy, logp = (partial.new_empty((n,)) for n in (rows, rows, rows, 0 if targets is None else rows))
    argmax = base.new_empty((rows,), dtype=dtype(base, "int64"))
    launch(
        _merge_stats_kernel, rows, base, fusion, vocab_size, tiles, partial, index, lse, top, argmax, entropy, targets,
        None if targets is None else targets.stride(0), None if targets is None else logp, TILES=next_power(tiles),
    )
    return lse, top, argmax, entropy, logp


supports_fused_stats = refuse_fusion


def aot_cases() -> list[AotCase]:
    """Production shapes: one shared expert pair in bf16, two pairs in fp32 with per-row weights."""

    def bf16() -> None:
        base, expert, anti = (Meta((8, 151936), "bfloat16") for _ in range(3))
        launch_fused_stats(one_expert(base, expert, anti, temperature_value=0.7), Meta((8,), "int64"))

    def fp32() -> None:
        base, *rest = (Meta((8, 32000), "float32") for _ in range(5))
        heat, weights = Meta((8,), "float32"), Meta((8, 2), "float32")
        launch_fused_stats(pairs(base, rest, weights, temperature=heat), None)

    def many() -> None:
        base, *rest = (Meta((8, 400000), "bfloat16") for _ in range(17))
        launch_fused_stats(pairs(base, rest, Meta((8, 8), "float32")), None)

    return [AotCase("bf16-k1-v151936", bf16), AotCase("fp32-k2-v32000", fp32), AotCase("bf16-k8-v400000", many)]
