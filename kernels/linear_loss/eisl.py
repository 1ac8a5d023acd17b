"""linear_eisl on a GPU: chunks of whole sentences; see reference/linear_loss/eisl.py for the equations.

A tile of logits and (max, log sum) of its rows, the log-probabilities of the sentence's own tokens gathered from it
[T, U], one program a block of n-gram columns for the softmax over positions, one a row to bring its gradient back to
the tokens, and one a row for dz = r p + A at the tokens: beyond cross-entropy, one more read of the logits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power
from .product import accumulate
from .rows import SCRATCH, block_of, logits, row_statistics, warps_of

NONE = tl.constexpr(-float("inf"))
COLUMNS = 64


@triton.jit
def _kept(mask, at, inside):
    """Which positions count; all of those inside without a mask."""
    if mask is not None:
        return inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _gather_kernel(z, vocab, i_max, i_log_sum, target, wanted, t, u, o_raw, BLOCK: tl.constexpr):
    """raw_tj = log softmax(z_t)[y_j] of a row, 0 at tokens that do not count."""
    row = tl.program_id(0).to(tl.int64)
    at = row // t * u + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < u
    kept = _kept(wanted, at, inside)
    y = tl.load(target + at, mask=kept, other=0)
    own = tl.load(z + row * vocab + y, mask=kept, other=0.0)
    raw = tl.where(kept, (own - tl.load(i_max + row)) - tl.load(i_log_sum + row), 0.0)
    tl.store(o_raw + row * u + tl.arange(0, BLOCK), raw, mask=inside)


@triton.jit
def _cost(raw, first, i, cols, mask, t, u, floor, n):
    """S of the n-grams from position i and tokens cols."""
    total = tl.zeros(cols.shape, tl.float32)
    for k in range(n):
        x = tl.load(raw + (first + i + k) * u + cols + k, mask=mask, other=0.0)
        total += tl.where(x < floor, floor, x)
    return total / n


@triton.jit
def _row_counts(source, first, i, n):
    kept = True
    if source is not None:
        for k in range(n):
            kept = kept & (tl.load(source + first + i + k) != 0)
    return kept


@triton.jit
def _ngram_kernel(
    raw, source, wanted, noise, t, u, n, invtau, floor, scale, blocks, o_loss, o_ds,
    LOGSUMEXP: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr,
):
    """Share of L_n of a block of columns of a sentence, and scale / n times its gradient in S."""
    pid = tl.program_id(0)
    b, block = (pid // blocks).to(tl.int64), pid % blocks
    height, width = t - n + 1, u - n + 1
    cols = block * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    every = tl.arange(0, ALL)
    counts, valid = every < width, inside
    for k in range(n):
        counts = counts & _kept(wanted, b * u + every + k, every < width)
        valid = valid & _kept(wanted, b * u + cols + k, inside)
    columns = tl.sum(counts.to(tl.int32), 0)
    top = tl.full((BLOCK,), NONE, tl.float32)
    mass, value = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    rows = 0
    for i in range(height):
        if _row_counts(source, b * t, i, n):
            s = _cost(raw, b * t, i, cols, inside, t, u, floor, n)
            x = s * n
            if not LOGSUMEXP:
                x = s
                if noise is not None:
                    x += tl.load(noise + (b * height + i) * width + cols, mask=inside, other=0.0).to(tl.float32)
                x *= invtau
            new = tl.maximum(top, x)
            fade, e = tl.exp(top - new), tl.exp(x - new)
            mass = mass * fade + e
            value = value * fade + e * s
            top = new
            rows += 1
    some = (rows > 0) & (columns > 0)
    mass, top = tl.where(some, mass, 1.0), tl.where(some, top, 0.0)
    if LOGSUMEXP:
        value = top + tl.log(mass)
    else:
        value = value / mass
    share = tl.where(valid & some, 1.0 / tl.maximum(columns, 1), 0.0)
    tl.store(o_loss + pid, -tl.sum(share * value, 0))
    for i in range(height):
        kept = _row_counts(source, b * t, i, n)
        s = _cost(raw, b * t, i, cols, inside, t, u, floor, n)
        x = s * n
        if not LOGSUMEXP:
            x = s
            if noise is not None:
                x += tl.load(noise + (b * height + i) * width + cols, mask=inside, other=0.0).to(tl.float32)
            x *= invtau
        g = tl.exp(x - top) / mass
        if LOGSUMEXP:
            g *= n
        else:
            g *= 1 + (s - value) * invtau
        ds = tl.where(kept & some, g * share * (-scale / n), 0.0)
        tl.store(o_ds + (b * height + i) * width + cols, ds, mask=inside)


@triton.jit
def _spread_kernel(
    raw, ds, sizes, source, wanted, t, u, floor, ce_share, o_a, o_sum, o_diagonal, CE: tl.constexpr, BLOCK: tl.constexpr
):
    """A of a row: gradients of its n-grams brought to their tokens, and the cross-entropy on the diagonal."""
    row = tl.program_id(0).to(tl.int64)
    b, i = row // t, row % t
    cols = tl.arange(0, BLOCK)
    inside = cols < u
    total = tl.zeros((BLOCK,), tl.float32)
    for m in tl.static_range(len(ds)):
        n = sizes[m]
        height, width = t - n + 1, u - n + 1
        for k in range(n):
            here = inside & (cols >= k) & (cols - k < width) & (i >= k) & (i - k < height)
            total += tl.load(ds[m] + (b * height + i - k) * width + cols - k, mask=here, other=0.0)
    x = tl.load(raw + row * u + cols, mask=inside, other=0.0)
    a = tl.where(x > floor, total, 0.0)
    if CE:
        own = (cols == i) & _kept(wanted, b * u + cols, inside) & _kept(source, row + 0 * cols, inside)
        a -= tl.where(own, tl.load(ce_share), 0.0)
        tl.store(o_diagonal + row, tl.sum(tl.where(own, x, 0.0), 0))
    tl.store(o_a + row * u + cols, a, mask=inside)
    tl.store(o_sum + row, -tl.sum(a, 0))


@triton.jit
def _dz_kernel(
    z, vocab, i_max, i_log_sum, i_sum, i_a, target, t, u, o_dz, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """dz = r p of a row, and at the sentence's tokens r p + their A, which replaces it; dz may be the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    top, log_sum, r = tl.load(i_max + row), tl.load(i_log_sum + row), tl.load(i_sum + row)
    tokens, j = target + row // t * u, tl.arange(0, TOKENS)
    y = tl.load(tokens + j, mask=j < u, other=0)
    z_y = tl.load(z + row * vocab + y, mask=j < u, other=NONE)
    own = r * tl.exp((z_y - top) - log_sum)
    for k in range(u):  # a token that stands twice gets both, and the same sum in both places
        own += tl.where(y == tl.load(tokens + k), tl.load(i_a + row * u + k), 0.0)
    tl.debug_barrier()  # the sweep may overwrite the logits, once every thread has read its tokens'
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * vocab + cols, mask=cols < vocab, other=NONE)
        g = r * tl.exp((x - top) - log_sum)
        tl.store(o_dz + row * vocab + cols, g.to(o_dz.dtype.element_ty), mask=cols < vocab)
    tl.debug_barrier()
    tl.store(o_dz + row * vocab + y, own.to(o_dz.dtype.element_ty), mask=j < u)


def ngram_gradients(
    z: Any, target: Any, given: tuple, noise: Any, masks: tuple, batch: int, out: Any
) -> tuple[list[Any], Any]:
    """Parts of the loss of every size and the log-probabilities on the diagonals of these sentences; dz into ``out``.

    z is ``[b T, V]`` float32; given is (sizes, weights, tau, logsumexp, floor, ngram_coef, ce_share); batch the number
    of all sentences.
    """
    sizes, weights, tau, logsumexp, floor, ngram_coef, ce_share = given
    (source, wanted), (rows, vocab), (count, u) = masks, z.shape, target.shape
    t, f32 = rows // count, dtype(z, "float32")
    top, log_sum = row_statistics(z, 1.0)
    raw, a = (z.new_empty((rows, u), dtype=f32) for _ in range(2))
    sums, diagonal = (z.new_zeros((rows,), dtype=f32) for _ in range(2))
    width = next_power(u)
    launch(_gather_kernel, rows, z, z, vocab, top, log_sum, target, wanted, t, u, raw, BLOCK=width)
    losses, grads = [], []
    for m, (n, weight) in enumerate(zip(sizes, weights, strict=True)):
        blocks = cdiv(u - n + 1, COLUMNS)
        loss, ds = z.new_empty((count * blocks,), dtype=f32), z.new_empty((count, t - n + 1, u - n + 1), dtype=f32)
        launch(
            _ngram_kernel, count * blocks, z, raw, source, wanted, noise[m] if noise else None, t, u, n, 1.0 / tau,
            float(floor), float(ngram_coef * weight / batch), blocks, loss, ds,
            LOGSUMEXP=logsumexp, BLOCK=COLUMNS, ALL=width,
        )
        losses.append(loss)
        grads.append(ds)
    launch(
        _spread_kernel, rows, z, raw, tuple(grads), tuple(sizes), source, wanted, t, u, float(floor), ce_share, a, sums,
        diagonal, CE=ce_share is not None, BLOCK=width,
    )
    if out is not None:
        launch(
            _dz_kernel, rows, z, z, vocab, top, log_sum, sums, a, target, t, u, out,
            BLOCK=block_of(vocab), TOKENS=width, num_warps=warps_of(vocab),
        )
    return losses, diagonal


def launch_linear_eisl(
    hidden: Any, head: Any, bias: Any, target: Any, ngrams: Any, weights: Any, tau: float, logsumexp: bool,
    floor: float, noise: Any, src_keep: Any, tgt_keep: Any, ngram_coef: float, ce_coef: float, need_hidden: bool,
    need_head: bool, need_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `linear_eisl` -> (loss, parts, dhidden, dhead, dbias)."""
    (batch, t, _), vocab, f32 = hidden.shape, head.shape[0], dtype(hidden, "float32")
    if src_keep is not None:  # what such a row holds must not reach the products
        hidden = hidden.masked_fill(src_keep.logical_not().unsqueeze(2), 0.0)
    if tgt_keep is not None:
        target = target.masked_fill(tgt_keep.logical_not(), 0)
    flat = hidden.reshape(batch * t, hidden.shape[2])
    dhidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    dhead = head.new_zeros(head.shape if need_head else (0,), dtype=f32)
    dbias = head.new_zeros((vocab,) if need_bias else (0,), dtype=f32)
    parts, pairs = hidden.new_zeros((len(ngrams) + 1,), dtype=f32), None
    if ce_coef:
        both = hidden.new_zeros((batch, t), dtype=f32) + 1.0
        for mask in (src_keep, tgt_keep):
            both = both if mask is None else both * mask.float()
        pairs = both.sum().clamp_min(1)
    share = None if pairs is None else ce_coef / pairs
    need = need_hidden or need_head or need_bias
    step = max(1, SCRATCH // (t * vocab * (4 + head.element_size())))
    for first in range(0, batch, step):
        part = slice(first, min(first + step, batch))
        rows = slice(part.start * t, part.stop * t)
        z = hidden.new_empty((rows.stop - rows.start, vocab), dtype=f32)
        logits(flat, head, bias, rows.start, z)
        dz = z if z.dtype == head.dtype else head.new_empty(z.shape)
        masks = tuple(None if mask is None else mask[part] for mask in (src_keep, tgt_keep))
        given = (ngrams, weights, tau, logsumexp, floor, ngram_coef, share)
        losses, diagonal = ngram_gradients(
            z, target[part], given, [x[part] for x in noise], masks, batch, dz if need else None
        )
        for m, loss in enumerate(losses):
            parts[m] += loss.sum() / batch
        parts[-1] -= diagonal.sum() / (1 if pairs is None else pairs)
        if need_hidden:
            dhidden[part] = dz.matmul(head).reshape(dhidden[part].shape)
        if need_head:
            accumulate(dhead, dz.t(), flat[rows])
        if need_bias:
            dbias += dz.float().sum(0)
    loss = parts[-1] * ce_coef
    for m, weight in enumerate(weights):
        loss = loss + parts[m] * (ngram_coef * weight)
    like = hidden if bias is None else bias
    return (
        loss, parts, dhidden, dhead.to(head.dtype), dbias.to(like.dtype) if need_bias else like.new_empty((0,)),
    )


def aot_cases() -> list[AotCase]:
    """Sentences of 64 tokens with masks, noise and cross-entropy; log-sum-exp over longer ones."""

    def run(count: int, t: int, vocab: int, sizes: tuple[int, ...], logsumexp: bool) -> None:
        z, y, mask = Meta((count * t, vocab), "float32"), Meta((count, t), "int64"), Meta((count, t), "bool")
        noise = [] if logsumexp else [Meta((count, t - n + 1, t - n + 1), "float32") for n in sizes]
        share = None if logsumexp else Meta((), "float32")
        given = (sizes, [1.0 / len(sizes)] * len(sizes), 1.0, logsumexp, -20.0, 1.0, share)
        masks = (None, None) if logsumexp else (mask, mask)
        ngram_gradients(z, y, given, noise, masks, count, Meta((count * t, vocab), "bfloat16"))

    return [
        AotCase("v32000-t64-masked", lambda: run(8, 64, 32000, (2, 3, 4), False)),
        AotCase("v151936-t256-logsumexp", lambda: run(2, 256, 151936, (2, 4), True)),
    ]
