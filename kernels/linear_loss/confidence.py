"""w2s_confidence_loss on a GPU: one program a row makes target, loss and gradient; nothing [B, C] but the gradient.

First (max, log sum) of every row; with two classes p_0 and its quantile, a sort of B numbers by the library; with more
classes a program a block of columns for mean p and mean w, rows summed in one order. Floor: logits and labels read
once, the gradient written once; the gradient's and the columns' sweeps are reads of their own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, refuse_double
from .rows import block_of, row_statistics, warps_of

LEAST_MEAN = tl.constexpr(2.0**-126)
NONE = tl.constexpr(-float("inf"))
#: Where a row's guess comes from: none, a threshold on p_0, the largest shifted logit.
NO_GUESS, PAIR, SHIFT = (tl.constexpr(i) for i in range(3))


@triton.jit
def _columns_kernel(
    z, z_stride, w, w_stride, rows, classes, top, log_sum, o_shift, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """log(mean p / mean w) of a block of classes."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_sum, w_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (cols < classes)[None, :]
        at = row.to(tl.int64)[:, None]
        line = tl.load(top + row, mask=row < rows, other=0.0) + tl.load(log_sum + row, mask=row < rows, other=0.0)
        x = tl.load(z + at * z_stride + cols[None, :], mask=inside, other=NONE).to(tl.float32)
        p_sum += tl.sum(tl.exp(x - line[:, None]), 0)
        w_sum += tl.sum(tl.load(w + at * w_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    shift = tl.log(tl.maximum(p_sum / rows, LEAST_MEAN) / (w_sum / rows))
    tl.store(o_shift + cols, shift, mask=cols < classes)


@triton.jit
def _power(log_p, weak, mask, alpha, beta):
    """log(p^beta w^alpha); an exponent of 0 leaves a factor out, where 0 log 0 would be NaN."""
    u = tl.where(beta == 0, 0.0, beta * log_p) + tl.where(alpha == 0, 0.0, alpha * tl.log(weak))
    return tl.where(mask, u, NONE)


@triton.jit
def _row_kernel(
    z, z_stride, w, w_stride, classes, top, log_sum, p0, threshold, coef, alpha, beta, share, o_loss, o_grad,
    PRODUCT: tl.constexpr, GUESS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, total_log = tl.load(top + row), tl.load(log_sum + row)
    # sums of w (of the product's target) and of it times log p; largest entry (of its logarithm) and where it is
    mass, a = 0.0, 0.0
    best = tl.full((), NONE, tl.float32)
    guess = tl.full((), 0, tl.int32)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < classes
        x = tl.load(z + row * z_stride + cols, mask=mask, other=NONE).to(tl.float32) - first
        weak = tl.load(w + row * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
        log_p = x - total_log
        if PRODUCT:
            u = _power(log_p, weak, mask, alpha, beta)
            new = tl.maximum(best, tl.max(u, 0))
            line = tl.where(new > NONE, new, 0.0)
            t = tl.exp(u - line)
            shrink = tl.exp(best - line)
            mass = mass * shrink + tl.sum(t, 0)
            a = a * shrink + tl.sum(tl.where(t == 0, 0.0, t * log_p), 0)
            best = new
        else:
            mass += tl.sum(weak, 0)
            a += tl.sum(tl.where(weak == 0, 0.0, weak * log_p), 0)
        if GUESS == SHIFT:
            score = x
            if threshold is not None:
                score = x - tl.load(threshold + cols, mask=mask, other=0.0)
            value, index = tl.max(score, 0), tl.argmax(score, 0)
            guess = tl.where(value > best, start + index, guess)
            best = tl.maximum(best, value)
    if PRODUCT:
        line = tl.where(best > NONE, best, 0.0)
        whole = tl.where(mass == 0, 0.0, 1.0)  # 0: no class is possible for both
        mass = tl.where(mass == 0, 1.0, mass)
        loss = -a / mass
    else:
        loss = tl.where(coef < 1, -(1 - coef) * a, 0.0)
    if GUESS == PAIR:
        guess = tl.where(tl.load(p0 + row) >= tl.load(threshold), 0, 1)
    if GUESS != NO_GUESS:
        loss -= coef * ((tl.load(z + row * z_stride + guess).to(tl.float32) - first) - total_log)
    tl.store(o_loss + row, loss)
    if GRADIENT:
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < classes
            x = tl.load(z + row * z_stride + cols, mask=mask, other=NONE).to(tl.float32) - first
            weak = tl.load(w + row * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp(x - total_log)
            if PRODUCT:
                g = p * whole - tl.exp(_power(x - total_log, weak, mask, alpha, beta) - line) / mass
            else:
                g = p * ((1 - coef) * mass + coef) - (1 - coef) * weak
            if GUESS != NO_GUESS:
                g -= tl.where(cols == guess, coef, 0.0)
            tl.store(o_grad + row * classes + cols, (g * share).to(o_grad.dtype.element_ty), mask=mask)


def shifts(z: Any, w: Any, top: Any, log_sum: Any) -> Any:
    """log(mean p / mean w) of every class."""
    rows, classes = z.shape
    found = z.new_empty((classes,), dtype=dtype(z, "float32"))
    block = 64
    launch(
        _columns_kernel, cdiv(classes, block), z, z, z.stride(0), w, w.stride(0), rows, classes, top, log_sum, found,
        ROWS=32, BLOCK=block,
    )
    return found


def rows_of(
    z: Any, w: Any, statistics: tuple[Any, Any], p0: Any, threshold: Any, guesses: bool, numbers: tuple, gradient: Any
) -> Any:
    """Losses of the rows; the gradient into ``gradient`` unless that is None."""
    product, coef, alpha, beta = numbers
    rows, classes = z.shape
    loss = z.new_empty((rows,), dtype=dtype(z, "float32"))
    launch(
        _row_kernel, rows, z, z, z.stride(0), w, w.stride(0), classes, *statistics, p0, threshold,
        float(coef), float(alpha), float(beta), 1.0 / max(rows, 1), loss, loss if gradient is None else gradient,
        PRODUCT=product, GUESS=0 if not guesses else 2 if p0 is None else 1, GRADIENT=gradient is not None,
        BLOCK=block_of(classes), num_warps=warps_of(classes),
    )
    return loss


def _quantile(p0: Any, w: Any, balance: int) -> Any:
    """The threshold of a batch of two classes, [1]."""
    if balance == 2 or p0.shape[0] == 0:
        return p0.new_full((1,), 0.5)
    at = w[:, 1].float().mean() if balance == 0 else p0.new_full((), 0.5)
    return p0.quantile(at.clamp(0, 1)).reshape(1)


def _pairs(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Single logits as two classes."""
    z, w = logits.new_zeros((logits.shape[0], 2)), labels.float().new_empty((logits.shape[0], 2))
    z[:, 1] = logits
    w[:, 1] = labels
    w[:, 0] = 1 - w[:, 1]
    return z, w


def launch_w2s_confidence_loss(
    logits: Any, soft_labels: Any, product: bool, coef: float, alpha: float, beta: float, balance: int, threshold: Any,
    need_loss: bool, need_gradient: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `w2s_confidence_loss` -> (loss, threshold_made, dlogits)."""
    single = len(logits.shape) == 1
    z, w = _pairs(logits, soft_labels) if single else (logits, soft_labels)
    statistics = row_statistics(z, 1.0)
    made, p0, guesses = z.new_empty((0,), dtype=dtype(z, "float32")), None, not product and coef > 0
    if guesses and z.shape[1] == 2:
        p0 = (z[:, 0].float() - z[:, 1].float()).sigmoid()
        if threshold is None:
            threshold = made = _quantile(p0, w, balance)
    elif guesses and threshold is None:
        plain = balance == 2 or z.shape[0] == 0
        made = made.new_zeros((z.shape[1],)) if plain else shifts(z, w, *statistics)
        threshold = None if plain else made
    grad = z.new_empty(z.shape if need_gradient else (0,))
    if not need_loss:
        return made.new_zeros(()), made, grad
    numbers = (product, coef, alpha, beta)
    loss = rows_of(z, w, statistics, p0, threshold, guesses, numbers, grad if need_gradient else None)
    if single and need_gradient:
        grad = grad[:, 1].contiguous()
    return loss.sum() / max(z.shape[0], 1), made, grad


def supports_w2s_confidence_loss(logits: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return refuse_double(logits)


def aot_cases() -> list[AotCase]:
    """The paper's two classes, a vision model's, and a language model's vocabulary by both kinds of target."""

    def run(rows: int, classes: int, element: str, product: bool = False) -> None:
        z, row = Meta((rows, classes), element), Meta((rows,), "float32")
        statistics = row_statistics(z, 1.0)
        pair, numbers = classes == 2, (product, 0.5, 1.0, 1.0)
        threshold = None if product else Meta((1,), "float32") if pair else shifts(z, z, *statistics)
        grad = Meta((rows, classes), element)
        rows_of(z, z, statistics, row if pair else None, threshold, not product, numbers, grad)

    return [
        AotCase("fp32-c2", lambda: run(32, 2, "float32")),
        AotCase("fp32-c1000", lambda: run(256, 1000, "float32")),
        AotCase("bf16-v32000", lambda: run(1024, 32000, "bfloat16")),
        AotCase("bf16-v151936-product", lambda: run(1024, 151936, "bfloat16", True)),
    ]
