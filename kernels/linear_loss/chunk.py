"""Losses over a vocabulary on a GPU, a chunk of rows at a time: logits [R, V] in float32 scratch, one kernel that makes
dz of them in place or in the heads' dtype, and the library's products dh = dz W, dW = dz^T h.

R is at least 2,048 whatever V is: dW is read and written once a chunk, which takes as long as the products when R is a
few hundred. Traffic a logit: 4 B written, 4 read (8 where a loss waits for other rows: preferences), 2 or 4 written, 4
or 8 read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..common import INF, cdiv, dtype, exp, launch, refuse_double
from .product import accumulate, logits_of, serves
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
def gradient_block(
    z, slope, mask, cols, line, unit, coef, coef_log, log_line, coef_all, dense, coef_dense, classes, i_ids, i_coefs, K,
    sign, keep, LOG: tl.constexpr,
):  # fmt: skip
    """dz = slope (p (coef + coef_log log p) + classes (coef_all + coef_dense dense) + sum_k sign coefs_k [v = ids_k]),
    with p = unit exp(z - line), log p = z - log_line, and classes 1 where there are none."""
    p = unit * exp(z - line)
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
    return tl.where(keep, g * slope, 0.0)


@triton.jit
def gradient_row(
    i_z, o_grad, vocab, scale, cap, line, unit, coef, coef_log, log_line, coef_all, dense, coef_dense, classes, i_ids,
    i_coefs, K, sign, keep, CAP: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`gradient_block` of a whole row, read from memory. It may overwrite the logits, each block once it is read."""
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, slope, mask = row_block(i_z, cols, vocab, scale, cap, CAP)
        g = gradient_block(
            z, slope, mask, cols, line, unit, coef, coef_log, log_line, coef_all, dense, coef_dense, classes, i_ids,
            i_coefs, K, sign, keep, LOG,
        )  # fmt: skip
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


def refuse_softcaps(model: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    if model.softcap and (len(model.hiddens) > 1 or model.weights is not None):
        return "a softcap of several models needs an accumulator a model; plain PyTorch serves it"
    return refuse_double(*model.hiddens, *model.heads)


class Chunks:
    """Logits of a call, chunk by chunk, and the gradients that its dz make.

    ``cap`` are the (scale, softcap, whether there is one) of `capped`: with a softcap the scratch holds plain products.
    """

    def __init__(self, model: Any, need: Any) -> None:
        self.model, self.need, self.vocab_size = model, need, model.vocab_size
        self.any = bool(need.need_hiddens or need.need_heads or need.need_biases or need.need_weights)
        self.rows, self.like = model.hiddens[0].shape[0], model.hiddens[0]
        self.single = dtype(self.like, "float32")
        capped = bool(model.softcap)
        plain = model._replace(weight_values=[1.0], temperature=1.0) if capped else model
        self.plain, self.by_library = plain, serves(plain)
        self.models, self.options = prepare(plain)
        self.cap = (model.weight_values[0] / model.temperature, model.softcap, True) if capped else (1.0, 1.0, False)
        self.dhiddens = self._zeros(model.hiddens, need.need_hiddens)
        self.dheads = self._zeros(model.heads, need.need_heads)
        self.dbiases = self._zeros(model.biases, need.need_biases)
        count = len(model.hiddens)
        self.dweights = self.row(count) if need.need_weights else self.like.new_empty((0,), dtype=self.single)

    def _zeros(self, tensors: Any, mask: int) -> list[Any]:
        return [t.new_zeros(t.shape if mask >> i & 1 else (0,), dtype=self.single) for i, t in enumerate(tensors)]

    def row(self, columns: int = 0) -> Any:
        """Zeros, float32 [T] or [T, columns]."""
        return self.like.new_zeros((self.rows, columns) if columns else (self.rows,), dtype=self.single)

    def each(self, parts: list[tuple[int, int]] | None = None) -> Iterator[tuple[int, int, Any, Any]]:
        """(first row, rows, z, dz to be written) of every chunk, of ``parts`` if given."""
        kind = self.model.heads[0].dtype
        for first, size in chunks(self.rows, self.vocab_size) if parts is None else parts:
            z = self.like.new_empty((size, self.vocab_size), dtype=self.single)
            self._logits(first, size, z)
            yield first, size, z, z if kind == self.single or not self.any else z.new_empty(z.shape, dtype=kind)

    def _logits(self, first: int, size: int, z: Any) -> None:
        if self.by_library:
            model, vocab = self.plain, self.vocab_size
            bias = model.biases[0][:vocab] if model.biases else None
            scale = model.weight_values[0] / model.temperature
            logits_of(model.hiddens[0][first : first + size], model.heads[0][:vocab], bias, scale, z)
            return
        blocks = cdiv(size, self.options["BLOCK_T"])
        launch(
            logits_kernel, blocks * cdiv(self.vocab_size, BLOCK_V), self.like, self.models, self.rows, first, size,
            self.vocab_size, blocks, z, **self.options,
        )  # fmt: skip

    def spend(self, first: int, size: int, dz: Any) -> None:
        """Adds a chunk's dz to the gradients."""
        model, need, vocab_size = self.model, self.need, self.vocab_size
        biases, weights, temperature = model.biases, model.weights, model.temperature
        part = slice(first, first + size)
        for i, (h, head) in enumerate(zip(model.hiddens, model.heads, strict=True)):
            scale = model.weight_values[i] / temperature if weights is None else weights[part, i : i + 1] / temperature
            g = dz.to(head.dtype)
            if need.need_hiddens >> i & 1 or need.need_weights:
                raw = g.matmul(head[:vocab_size]).float()
                if need.need_hiddens >> i & 1:
                    self.dhiddens[i][part] = raw * scale
                if need.need_weights:
                    bias = dz.float().matmul(biases[i][:vocab_size].float()) if biases else 0.0
                    self.dweights[part, i] = ((raw * h[part].float()).sum(1) + bias) / temperature
            if need.need_heads >> i & 1:
                own, by = (h[part], scale) if weights is None else (h[part].float() * scale, 1.0)
                accumulate(self.dheads[i][:vocab_size], g.t(), own.to(head.dtype), by)
            if need.need_biases >> i & 1:
                self.dbiases[i][:vocab_size] += (dz.float() * scale).sum(0)

    def gradients(self) -> dict[str, Any]:
        """dhiddens, dheads, dbiases in the dtypes of their tensors, and dweights."""
        model = self.model
        lists = ((self.dhiddens, model.hiddens), (self.dheads, model.heads), (self.dbiases, model.biases))
        cast = ([x.to(t.dtype) for x, t in zip(xs, ts, strict=True)] for xs, ts in lists)
        return {**dict(zip(("dhiddens", "dheads", "dbiases"), cast, strict=True)), "dweights": self.dweights}


def options() -> dict[str, Any]:
    """One program a row: long blocks, so that a row is few iterations."""
    return {"BLOCK": 4096, "num_warps": 8}
