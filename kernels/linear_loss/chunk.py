"""Losses over a vocabulary on a GPU, a chunk of rows at a time: logits [R, V] in float32 scratch, one kernel that reads
a row twice (statistics, then dz in place or in the heads' dtype), and the library's products dh = dz W, dW = dz^T h.

R is at least 2,048 whatever V is: dW is read and written once a chunk, which takes as long as the products when R is a
few hundred. Traffic a logit: 4 B written, 8 read, 2 or 4 written, 4 or 8 read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..common import INF, cdiv, dtype, launch, refuse_double
from .tile import BLOCK_V, fused_tile, prepare

#: Bytes of logits that exist at a time, unless that is less than ROWS rows.
SCRATCH = 1 << 30
ROWS = 2048


@triton.jit(do_not_specialize=["count", "first", "chunk", "blocks"])  # they change with every batch
def logits_kernel(
    models, count, first, chunk, vocab, blocks, o_z,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """float32 logits of rows [first, first + chunk), those below ``count``, of all models fused."""
    pid = tl.program_id(0)
    tile = (pid // blocks).to(tl.int64)  # row blocks are next to each other: they share the tile of W in the cache
    local = (pid % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = (local < chunk) & (first + local < count)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = fused_tile(models, first + local, row_mask, cols, cols < vocab, BLOCK_T, BLOCK_V, BLOCK_K, DOT_F32)
    tl.store(o_z + local[:, None] * vocab + cols[None, :], z, mask=row_mask[:, None] & (cols < vocab)[None, :])


@triton.jit
def capped(x, scale, cap, CAP: tl.constexpr):
    """The logit of a product x and its derivative, which are x and 1 without a softcap."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAP:
        e = tl.exp(-2.0 * tl.abs(x) / cap)
        unit = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
        x = unit * cap * scale
        slope = 1.0 - unit * unit
    return x, slope


@triton.jit
def row_block(i_z, cols, vocab, scale, cap, CAP: tl.constexpr):
    """z (-inf past the vocabulary), its slope and the mask of a block of a row."""
    mask = cols < vocab
    z, slope = capped(tl.load(i_z + cols, mask=mask, other=0.0), scale, cap, CAP)
    return tl.where(mask, z, -INF), slope, mask


@triton.jit
def gradient_row(
    i_z, o_grad, vocab, scale, cap, line, unit, coef, coef_log, log_line, coef_all, dense, coef_dense, classes, i_ids,
    i_coefs, K, sign, keep, CAP: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = slope (p (coef + coef_log log p) + classes (coef_all + coef_dense dense) + sum_k sign coefs_k [v = ids_k]),
    with p = unit exp(z - line), log p = z - log_line, and classes 1 where there are none. It may overwrite the logits,
    once every thread has read its label's."""
    tl.debug_barrier()
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, slope, mask = row_block(i_z, cols, vocab, scale, cap, CAP)
        p = unit * tl.exp(z - line)
        if LOG:
            g = p * (coef + coef_log * tl.maximum(z - log_line, -1e4, propagate_nan=tl.PropagateNan.ALL))
        else:
            g = p * coef
        if classes is not None:
            weighed = tl.full(g.shape, 0.0, tl.float32) + coef_all
            if dense is not None:
                weighed += coef_dense * tl.load(dense + cols, mask=mask, other=0.0).to(tl.float32)
            g += weighed * tl.load(classes + cols, mask=mask, other=0.0)
        else:
            g += coef_all
            if dense is not None:
                g += coef_dense * tl.load(dense + cols, mask=mask, other=0.0).to(tl.float32)
        for k in range(K):
            own = cols == tl.load(i_ids + k)
            g += tl.where(own, sign * tl.load(i_coefs + k).to(tl.float32), 0.0)
        g = tl.where(keep, g * slope, 0.0)
        tl.store(o_grad + cols, g.to(o_grad.dtype.element_ty), mask=mask)


def most_rows(vocab_size: int) -> int:
    """Rows of logits that may exist at a time."""
    return max(ROWS, SCRATCH // (4 * vocab_size))


def chunks(rows: int, vocab_size: int) -> list[tuple[int, int]]:
    """(first, rows) of even chunks, a multiple of 128 rows each but the last."""
    most = most_rows(vocab_size)
    count = cdiv(rows, most)
    size = min(cdiv(cdiv(rows, max(count, 1)), 128) * 128, rows) or 1
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]


def supports_chunk(*args: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    hiddens, heads, weights, softcap = args[0], args[1], args[3], args[6]
    if softcap and (len(hiddens) > 1 or weights is not None):
        return "a softcap of several models needs an accumulator a model; plain PyTorch serves it"
    return refuse_double(*hiddens, *heads)


class Chunks:
    """Logits of a call, chunk by chunk, and the gradients that its dz make.

    ``cap`` are the (scale, softcap, whether there is one) of `capped`: with a softcap the scratch holds plain products.
    """

    def __init__(self, given: tuple[Any, ...], need: tuple[Any, ...]) -> None:
        hiddens, heads, biases, weights, values, temperature, softcap, self.vocab_size = given
        self.given, self.need, self.any = given, need, any(need)
        self.rows, self.like = hiddens[0].shape[0], hiddens[0]
        self.single = dtype(hiddens[0], "float32")
        plain = ([1.0], 1.0) if softcap else (values, temperature)
        self.models, self.options = prepare(hiddens, heads, biases, weights, *plain)
        self.cap = (values[0] / temperature, softcap, True) if softcap else (1.0, 1.0, False)
        self.grads = [self._zeros(t, mask) for t, mask in zip((hiddens, heads, biases), need[:3], strict=True)]
        self.dweights = self.row(len(hiddens)) if need[3] else self.like.new_empty((0,), dtype=self.single)

    def _zeros(self, tensors: Any, mask: int) -> list[Any]:
        return [t.new_zeros(t.shape if mask >> i & 1 else (0,), dtype=self.single) for i, t in enumerate(tensors)]

    def row(self, columns: int = 0) -> Any:
        """Zeros, float32 [T] or [T, columns]."""
        return self.like.new_zeros((self.rows, columns) if columns else (self.rows,), dtype=self.single)

    def each(self, parts: list[tuple[int, int]] | None = None) -> Iterator[tuple[int, int, Any, Any]]:
        """(first row, rows, z, dz to be written) of every chunk, of ``parts`` if given."""
        kind = self.given[1][0].dtype
        for first, size in chunks(self.rows, self.vocab_size) if parts is None else parts:
            z = self.like.new_empty((size, self.vocab_size), dtype=self.single)
            blocks = cdiv(size, self.options["BLOCK_T"])
            launch(
                logits_kernel, blocks * cdiv(self.vocab_size, BLOCK_V), self.like, self.models, self.rows, first, size,
                self.vocab_size, blocks, z, **self.options,
            )  # fmt: skip
            yield first, size, z, z if kind == self.single or not self.any else z.new_empty(z.shape, dtype=kind)

    def spend(self, first: int, size: int, dz: Any) -> None:
        """Adds a chunk's dz to the gradients."""
        hiddens, heads, biases, weights, values, temperature, _, vocab_size = self.given
        need_h, need_w, need_b, need_weights = self.need
        part = slice(first, first + size)
        for i, (h, head) in enumerate(zip(hiddens, heads, strict=True)):
            scale = values[i] / temperature if weights is None else weights[part, i : i + 1] / temperature
            g = dz.to(head.dtype)
            if need_h >> i & 1 or need_weights:
                raw = g.matmul(head[:vocab_size]).float()
                if need_h >> i & 1:
                    self.grads[0][i][part] = raw * scale
                if need_weights:
                    bias = dz.float().matmul(biases[i][:vocab_size].float()) if biases else 0.0
                    self.dweights[part, i] = ((raw * h[part].float()).sum(1) + bias) / temperature
            if need_w >> i & 1:
                self.grads[1][i][:vocab_size] += g.t().matmul((h[part].float() * scale).to(head.dtype))
            if need_b >> i & 1:
                self.grads[2][i][:vocab_size] += (dz.float() * scale).sum(0)

    def gradients(self) -> tuple[list[Any], list[Any], list[Any], Any]:
        """dhiddens, dheads, dbiases in the dtypes of their tensors, and dweights."""
        cast = [
            [x.to(t.dtype) for x, t in zip(xs, ts, strict=True)]
            for xs, ts in zip(self.grads, self.given[:3], strict=True)
        ]
        return cast[0], cast[1], cast[2], self.dweights


def options() -> dict[str, Any]:
    """One program a row: long blocks, so that a row is few iterations."""
    return {"BLOCK": 4096, "num_warps": 8}
