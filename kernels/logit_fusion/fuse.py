"""fuse_logits and fused_log_softmax.

    z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature,   logp = z - log sum_v exp z_v

One program a tile of a row: read the K + 2 tiles, write one. With the lse, the partials of partials.py come first (the
second read of the tiles comes from the L2 cache where a step's logits fit) and each program merges its row's partials.
Floor: K + 2 logit tensors read once, one written; nothing else of size [B, V].
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Meta, cdiv, dtype, launch, next_power, row_tile, safe, tile_width
from .filters import plausible_fusion
from .fusion import load_fused, one_expert, pairs, refuse_fusion
from .partials import merge_sums, merged_lse, row_lse, tile_stats


@triton.jit
def _fuse_kernel(fusion, vocab, tiles, o_out, i_partial, o_lse, TILES: tl.constexpr, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    z = load_fused(fusion, row, cols, cols < vocab)  # [BLOCK]
    if i_partial is not None:
        top, total, _, _ = merge_sums(i_partial, row, tiles, TILES)
        lse = row_lse(top, total)
        # a row of -inf alone has no distribution: -inf - (-inf) is NaN there, as in torch.log_softmax
        # max and log sum subtracted in turn: at an offset of 1e4 the rounding of lse would be 5e-4
        logp = z - safe(top) - tl.log(total)
        z = tl.where(z == -INF, tl.where(lse > -INF, -INF, float("nan")), logp)
        tl.store(o_lse + row, lse, mask=tile == 0)
    tl.store(o_out + row * vocab + cols, z.to(o_out.dtype.element_ty), mask=cols < vocab)


def launch_fuse_logits(given: Any, out_dtype: Any, need_lse: bool) -> tuple[Any, Any]:
    """Arguments of `fuse_logits` -> (fused, lse); lse of shape (0,) unless ``need_lse``."""
    base, vocab_size = given.base, given.vocab_size
    rows = base.shape[0]
    fusion = plausible_fusion(given)
    out = base.new_empty((rows, vocab_size), dtype=out_dtype)
    block = tile_width(vocab_size)
    tiles = cdiv(vocab_size, block)
    launch(
        _fuse_kernel, rows * tiles, base, fusion, vocab_size, tiles, out, None, None, TILES=1, BLOCK=block,
        num_warps=8,  # with 4, ptxas spills three words on sm_100
    )  # fmt: skip
    if not need_lse:
        return out, base.new_empty((0,), dtype=dtype(base, "float32"))
    partial, _, tiles = tile_stats(fusion, rows, vocab_size)
    return out, merged_lse(partial, tiles)


def launch_fused_log_softmax(given: Any, out_dtype: Any) -> tuple[Any, Any]:
    """Arguments of `fused_log_softmax` -> (logp, lse)."""
    base, vocab_size = given.base, given.vocab_size
    rows = base.shape[0]
    fusion = plausible_fusion(given)
    partial, _, tiles = tile_stats(fusion, rows, vocab_size)
    out = base.new_empty((rows, vocab_size), dtype=out_dtype)
    lse = partial.new_empty((rows,))
    launch(
        _fuse_kernel, rows * tiles, base, fusion, vocab_size, tiles, out, partial, lse, TILES=next_power(tiles),
        BLOCK=tile_width(vocab_size),
    )
    return out, lse


supports_fuse_logits = supports_fused_log_softmax = refuse_fusion


def aot_cases() -> list[AotCase]:
    """bf16 logits of a Qwen-sized vocabulary, fp32 of a Llama-sized one."""

    def bf16() -> None:
        base, expert, anti = (Meta((8, 151936), "bfloat16") for _ in range(3))
        given = one_expert(base, expert, anti)
        launch_fuse_logits(given, "bfloat16", True)
        launch_fused_log_softmax(given, "float32")

    def fp32() -> None:
        base, *rest = (Meta((8, 32000), "float32") for _ in range(5))
        given = pairs(base, rest, Meta((8, 2), "float32"), plausible=2, plausible_value=0.9)
        launch_fuse_logits(given, "float32", False)
        launch_fused_log_softmax(given, "float32")

    return [AotCase("bf16-k1-v151936", bf16), AotCase("fp32-k2-v32000-top-p", fp32)]
