"""A tile of fused logits, z_tv = sum_i scale_ti (W_i,v . h_ti + b_iv), from the models' own tensors: no stack, no copy.

One program computes [BLOCK_T, BLOCK_V] logits with tl.dot over BLOCK_K columns of each model in turn; scale is
w / temperature. Cost 2 T V sum_i D_i FLOPs a sweep.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, cdiv, dtype, launch, refuse_double, safe
from ..logit_fusion.fusion import number

BLOCK_V = 128


@triton.jit
def fused_tile(
    models,
    rows,
    row_mask,
    cols,
    col_mask,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """z, float32 [BLOCK_T, BLOCK_V]; -inf in masked columns."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for i in tl.static_range(len(models[0])):
        part = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        width = models[4][i]
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            h = tl.load(
                models[0][i] + rows[:, None] * models[1][i] + k[None, :],
                mask=row_mask[:, None] & (k[None, :] < width),
                other=0.0,
            )  # [BLOCK_T, BLOCK_K]
            w = tl.load(
                models[2][i] + cols[None, :] * models[3][i] + k[:, None],
                mask=col_mask[None, :] & (k[:, None] < width),
                other=0.0,
            )  # [BLOCK_K, BLOCK_V]
            if DOT_F32:
                h, w = h.to(tl.float32), w.to(tl.float32)
            part = tl.dot(h, w, part, input_precision="ieee")
        if len(models[5]) > 0:
            part += tl.load(models[5][i] + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if models[6] is not None:
            scale = tl.load(models[6] + rows * len(models[0]) + i, mask=row_mask, other=0.0).to(tl.float32)
            z += part * (scale * number(models[8]))[:, None]
        else:
            z += part * number(models[7][i])
    return tl.where(col_mask[None, :], z, -float("inf"))


@triton.jit
def _stats_kernel(
    models,
    count,
    vocab,
    blocks,
    target,
    o_max,
    o_sum,
    o_target,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = (pid // blocks).to(tl.int64)  # row blocks are next to each other: they share the tile of W in the cache
    rows = (pid % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = rows < count
    z = fused_tile(models, rows, row_mask, cols, cols < vocab, BLOCK_T, BLOCK_V, BLOCK_K, DOT_F32)
    top = tl.max(z, 1)
    total = tl.sum(tl.exp(z - safe(top)[:, None]), 1)
    tl.store(o_max + tile * count + rows, top, mask=row_mask)
    tl.store(o_sum + tile * count + rows, total, mask=row_mask)
    if target is not None:
        y = tl.load(target + rows, mask=row_mask, other=-1)
        own = row_mask & (y >= tile * BLOCK_V) & (y < tile * BLOCK_V + BLOCK_V) & (y < vocab)
        tl.store(o_target + rows, tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1), mask=own)


@triton.jit
def _merge_kernel(count, tiles, i_max, i_sum, target, ignored, i_target, o_logp, o_lse, o_unit, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        m = tl.load(i_max + tile * count + rows, mask=mask, other=-float("inf"))
        s = tl.load(i_sum + tile * count + rows, mask=mask, other=0.0)
        new = tl.maximum(top, m)
        total = total * tl.exp(safe(top) - safe(new)) * (top > -float("inf")) + s * tl.exp(safe(m) - safe(new))
        top = new
    lse = tl.log(total) + safe(top)
    # exp(z - lse) unit = exp(z - top) / total: undoes the rounding of lse, whose absolute error grows with |lse|
    unit = tl.where(total > 0, tl.exp(lse - safe(top)) / total, 1.0)
    y = tl.load(target + rows, mask=mask, other=0)
    keep = y != ignored
    z = tl.load(i_target + rows, mask=mask & keep, other=0.0)
    tl.store(o_lse + rows, tl.where(keep, lse, 0.0), mask=mask)
    tl.store(o_logp + rows, tl.where(keep, (z - safe(top)) - tl.log(total), 0.0), mask=mask)
    tl.store(o_unit + rows, unit, mask=mask)


@triton.jit
def _grad_kernel(
    models,
    count,
    first,
    chunk,
    vocab,
    blocks,
    target,
    ignored,
    i_lse,
    i_a,
    i_b,
    o_grad,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """dz_tv = a_t [v = y_t] + b_t exp(z_tv - lse_t) of rows [first, first + chunk), 0 in ignored rows."""
    pid = tl.program_id(0)
    tile = (pid // blocks).to(tl.int64)
    local = (pid % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = first + local
    row_mask = (local < chunk) & (rows < count)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    col_mask = cols < vocab
    z = fused_tile(models, rows, row_mask, cols, col_mask, BLOCK_T, BLOCK_V, BLOCK_K, DOT_F32)
    y = tl.load(target + rows, mask=row_mask, other=0)
    lse = tl.load(i_lse + rows, mask=row_mask, other=0.0)
    a = tl.load(i_a + rows, mask=row_mask, other=0.0)
    b = tl.load(i_b + rows, mask=row_mask, other=0.0)
    g = tl.exp(z - safe(lse)[:, None]) * b[:, None] + tl.where(cols[None, :] == y[:, None], a[:, None], 0.0)
    g = tl.where((y != ignored)[:, None], g, 0.0)
    tl.store(
        o_grad + local[:, None] * vocab + cols[None, :],
        g.to(o_grad.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


def config(rows: int, double_bytes: bool) -> dict[str, Any]:
    """Tile sizes: short blocks for decoding, 64 rows for scoring; half the depth for float32."""
    return {
        "BLOCK_T": 16 if rows <= 16 else 64,
        "BLOCK_V": BLOCK_V,
        "BLOCK_K": 32 if double_bytes else 64,
        "num_warps": 8,
    }


def prepare(model: Any) -> tuple[tuple, dict[str, Any]]:
    """The `models` tuple and the compile-time options of a call."""
    hiddens, heads, weights, temperature = model.hiddens, model.heads, model.weights, model.temperature
    models = (
        tuple(hiddens),
        tuple(h.stride(0) for h in hiddens),
        tuple(heads),
        tuple(w.stride(0) for w in heads),
        tuple(h.shape[1] for h in hiddens),
        tuple(model.biases),
        weights,
        tuple(v / temperature for v in model.weight_values),
        1.0 / temperature,
    )
    wide = any("float32" in str(h.dtype) for h in hiddens)
    options = config(hiddens[0].shape[0], wide)
    # the interpreter's dot takes float32 only; hiddens of different models may differ in dtype
    options["DOT_F32"] = bool(getattr(hiddens[0], "device", None) is not None and hiddens[0].device.type == "cpu")
    return models, options


def refuse_softcap(model: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if model.softcap:
        return "a softcap needs an accumulator a model; plain PyTorch serves it"
    return refuse_double(*model.hiddens, *model.heads)


def model_of(hiddens: Any, heads: Any, **changes: Any) -> Group:
    """A model of one or more heads, all with the weight 1."""
    usual = Group(
        hiddens=hiddens, heads=heads, biases=[], weights=None, weight_values=[1.0] * len(heads), temperature=1.0,
        softcap=0.0, vocab_size=heads[0].shape[0],
    )
    return usual._replace(**changes)


def statistics(models: tuple, options: dict[str, Any], vocab_size: int, target: Any) -> tuple[Any, Any, Any]:
    """(max, sum) of every tile ``[tiles, T]`` and the target's logit ``[T]``."""
    like = models[0][0]
    rows, tiles = like.shape[0], cdiv(vocab_size, BLOCK_V)
    top, total = (like.new_empty((tiles, rows), dtype=dtype(like, "float32")) for _ in range(2))
    at_target = like.new_zeros((rows,), dtype=dtype(like, "float32"))
    blocks = cdiv(rows, options["BLOCK_T"])
    launch(
        _stats_kernel, blocks * tiles, like, models, rows, vocab_size, blocks, target, top, total, at_target, **options
    )
    return top, total, at_target


def log_probabilities(
    models: tuple, options: dict[str, Any], vocab_size: int, target: Any, ignore_index: int
) -> tuple[Any, Any, Any]:
    """logp and lse ``[T]``, 0 in ignored rows, and unit ``[T]``: P = unit exp(z - lse) to the last digits."""
    top, total, at_target = statistics(models, options, vocab_size, target)
    tiles, rows = top.shape
    logp, lse, unit = (top.new_empty((rows,)) for _ in range(3))
    launch(
        _merge_kernel,
        cdiv(rows, 64),
        top,
        rows,
        tiles,
        top,
        total,
        target,
        ignore_index,
        at_target,
        logp,
        lse,
        unit,
        BLOCK=64,
    )
    return logp, lse, unit


def gradient_tile(
    models: tuple,
    options: dict[str, Any],
    vocab_size: int,
    target: Any,
    ignore_index: int,
    lse: Any,
    a: Any,
    b: Any,
    first: int,
    out: Any,
) -> None:
    """dz of rows [first, first + len(out)) into ``out``."""
    like = models[0][0]
    chunk, blocks = out.shape[0], cdiv(out.shape[0], options["BLOCK_T"])
    launch(
        _grad_kernel,
        blocks * cdiv(vocab_size, BLOCK_V),
        like,
        models,
        like.shape[0],
        first,
        chunk,
        vocab_size,
        blocks,
        target,
        ignore_index,
        lse,
        a,
        b,
        out,
        **options,
    )


def aot_cases() -> list[AotCase]:
    """Three models in bf16 at a Qwen-sized vocabulary, one in fp32 at a Llama-sized one."""

    def case(kind: str, rows: int, vocab: int, sizes: tuple[int, ...]) -> None:
        hiddens, heads = [Meta((rows, d), kind) for d in sizes], [Meta((vocab, d), kind) for d in sizes]
        models, options = prepare(model_of(hiddens, heads))
        target, row = Meta((rows,), "int64"), Meta((rows,), "float32")
        log_probabilities(models, options, vocab, target, -100)
        gradient_tile(models, options, vocab, target, -100, row, row, row, 0, Meta((rows, vocab), kind))

    return [
        AotCase("bf16-n3-v151936", lambda: case("bfloat16", 4096, 151936, (4096, 1024, 1024))),
        AotCase("fp32-n1-v32000", lambda: case("float32", 512, 32000, (2048,))),
    ]
