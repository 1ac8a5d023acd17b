"""linear_fusion_sample on a GPU: one sweep writes (max, sum) of every tile of 128 tokens; one program a row picks the
tile by its mass, computes that tile's logits again and draws inside it. Prefix masses are float64."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, AotCase, Meta, cdiv, dtype, launch, next_power, safe
from ..logit_fusion.sample import choose, draw_in_tile
from .tile import BLOCK_V, fused_tile, model_of, prepare, refuse_softcap, statistics


@triton.jit
def _draw_kernel(
    models,
    count,
    vocab,
    tiles,
    i_max,
    i_sum,
    uniform,
    o_token,
    o_logprob,
    o_lse,
    o_kept,
    GREEDY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILES)
    tops = tl.load(i_max + i.to(tl.int64) * count + row, mask=i < tiles, other=-INF)
    sums = tl.load(i_sum + i.to(tl.int64) * count + row, mask=i < tiles, other=0.0)
    top = tl.max(tops, 0)
    masses = sums * tl.exp(safe(tops) - safe(top))
    masses = tl.where((tops > -INF) | (sums != sums), masses, 0.0)
    lse = tl.log(tl.sum(masses, 0)) + safe(top)
    tile, before, goal = choose(masses, i, tl.load(uniform + row).to(tl.float64))
    if GREEDY:
        tile = tl.min(tl.where(tops == top, i, NO_INDEX), 0)
    tile = tl.where((tile >= 0) & (tile < tiles), tile, 0)
    cols = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = tl.arange(0, BLOCK_T)
    z = fused_tile(models, row + lane, lane < 1, cols, cols < vocab, BLOCK_T, BLOCK_V, BLOCK_K, DOT_F32)
    z = tl.max(tl.where((lane < 1)[:, None], z, -INF), 0)  # [BLOCK_V]
    if GREEDY:
        best = tl.max(z, 0)
        token = tl.min(tl.where(z == best, cols, NO_INDEX), 0)
        chosen = best
    else:
        mass = tl.where(z > -INF, tl.exp(z - safe(top)), 0.0)
        token, chosen = draw_in_tile(z, mass, cols, before, goal)
    fine = (lse == lse) & (tl.abs(lse) < INF)
    tl.store(o_token + row, tl.where(fine, token, -1).to(tl.int64))
    tl.store(o_logprob + row, tl.where(fine, chosen - lse, float("nan")))
    tl.store(o_lse + row, lse)
    tl.store(o_kept + row, tl.where(fine, 1 if GREEDY else vocab, 0).to(tl.int32))


def launch_linear_fusion_sample(model: Any, uniform: Any) -> tuple[Any, Any, Any, Any]:
    """Arguments of `linear_fusion_sample` -> (token, logprob, lse, kept)."""
    greedy, like, vocab_size = model.temperature == 0, model.hiddens[0], model.vocab_size
    models, options = prepare(model._replace(temperature=1.0) if greedy else model)
    top, total, _ = statistics(models, options, vocab_size, None)
    rows, tiles = like.shape[0], cdiv(vocab_size, BLOCK_V)
    token, kept = (
        like.new_empty((rows,), dtype=dtype(like, "int64")),
        like.new_empty((rows,), dtype=dtype(like, "int32")),
    )
    logprob, lse = top.new_empty((rows,)), top.new_empty((rows,))
    launch(
        _draw_kernel,
        rows,
        like,
        models,
        rows,
        vocab_size,
        tiles,
        top,
        total,
        uniform,
        token,
        logprob,
        lse,
        kept,
        GREEDY=greedy,
        TILES=next_power(tiles),
        **{**options, "BLOCK_T": 16},
    )
    return token, logprob, lse, kept


def supports_linear_fusion_sample(model: Any, uniform: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if model.biases:
        return "kept counts columns that a bias of -inf masks; plain PyTorch serves biases"
    return refuse_softcap(model)


def aot_cases() -> list[AotCase]:
    """Three models in bf16 decoding 8 rows."""

    def bf16() -> None:
        sizes = (4096, 1024, 1024)
        hiddens, heads = [Meta((8, d), "bfloat16") for d in sizes], [Meta((151936, d), "bfloat16") for d in sizes]
        model = model_of(hiddens, heads, weight_values=[1.0, 1.0, -1.0])
        launch_linear_fusion_sample(model, Meta((8,), "float32"))

    return [AotCase("bf16-n3-v151936", bf16)]
