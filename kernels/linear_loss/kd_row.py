"""The row kernel of kd_loss and linear_kd; kd.py says how rows reach it.

One program a row: a sweep for D and the mean that its gradient needs, one for the gradient. What a kind is made of
stands in one helper for each of the two; equations in reference/linear_loss/distillation.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

FKL, RKL, JSD, SCE, CE_SOFT, PRODUCT, COSINE = (tl.constexpr(i) for i in range(7))
LOGITS, PROBS, TOPK, LINEAR, LINEAR_BIAS = (tl.constexpr(i) for i in range(5))
LOG_FLOOR, REMAINDER_FLOOR = tl.constexpr(-1e4), tl.constexpr(1e-12)
NORM_FLOOR = tl.constexpr(1e-8)
NONE = tl.constexpr(-float("inf"))


@triton.jit
def _teacher(teachers, m: tl.constexpr, form: tl.constexpr, row, cols, mask, invtau):
    """log q and q of teacher m, [BLOCK]; -inf and 0 in masked columns."""
    values = teachers[0][m] + row * teachers[1][m]
    if form == LOGITS:
        top, log_sum = tl.load(teachers[4][m] + row), tl.load(teachers[5][m] + row)
        z = tl.load(values + cols, mask=mask, other=NONE).to(tl.float32)
        log_q = (z - top) * invtau - log_sum
        q = tl.exp(log_q)
    elif form == PROBS:
        q = tl.load(values + cols, mask=mask, other=0.0).to(tl.float32)
        log_q = tl.log(q)
    else:
        rest = tl.load(teachers[4][m] + row)
        q = tl.where(mask, rest, 0.0)
        for k in range(teachers[3][m]):
            own = cols == tl.load(teachers[2][m] + row * teachers[3][m] + k)
            q += tl.where(own, tl.exp(tl.load(values + k).to(tl.float32)) - rest, 0.0)
        log_q = tl.log(q)
    return log_q, q


@triton.jit
def _raw(teachers, row, cols, mask):
    """Logits of the first teacher, 0 in masked columns."""
    values = teachers[0][0] + row * teachers[1][0]
    return tl.load(values + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mixture(teachers, FORMS: tl.constexpr, row, cols, mask, invtau):
    """log q, floored, and q of the mixture."""
    log_q, q = _teacher(teachers, 0, FORMS[0], row, cols, mask, invtau)
    if len(FORMS) > 1:
        q *= teachers[6][0]
        log_q += tl.log(teachers[6][0] + tl.zeros_like(log_q))
        for m in tl.static_range(1, len(FORMS)):
            log_m, q_m = _teacher(teachers, m, FORMS[m], row, cols, mask, invtau)
            share = teachers[6][m]
            log_m += tl.log(share + tl.zeros_like(log_m))
            q += share * q_m
            gap = tl.where(log_q == log_m, 0.0, tl.abs(log_q - log_m))
            log_q = tl.maximum(log_q, log_m) + tl.log(1 + tl.exp(-gap))
    return tl.maximum(log_q, LOG_FLOOR, propagate_nan=tl.PropagateNan.ALL), q


@triton.jit
def _ratios(log_p, log_q, beta):
    """log p - log m and log q - log m of m = beta q + (1 - beta) p; exactly 0 where the two are equal."""
    d = log_q - log_p
    u = tl.exp(-tl.abs(d))
    over = tl.log(tl.where(d > 0, beta + (1 - beta) * u, 1 - beta + beta * u))
    return -over - tl.maximum(d, 0.0), tl.minimum(d, 0.0) - over


@triton.jit
def _log_product(log_p, log_q, mask, beta, power):
    """beta log p + power log q; -inf where a factor is 0 and in masked columns. A power of 0 leaves its factor out."""
    q = tl.where(log_q == LOG_FLOOR, NONE, log_q)  # at the floor q is 0
    return tl.where(mask, tl.where(beta == 0, 0.0, beta * log_p) + tl.where(power == 0, 0.0, power * q), NONE)


@triton.jit
def _add(KIND: tl.constexpr, z, log_p, p, log_q, q, teachers, row, cols, mask, beta, power, a, b, mass, peak):
    """A block's part of D's sums: of its terms (a), of those under p (b), of q (mass); peak: see `_row_kernel`."""
    under_p, under_q = tl.where(p == 0, 0.0, log_p), tl.where(q == 0, 0.0, log_p)
    if KIND == COSINE:
        y_t = _raw(teachers, row, cols, mask)
        y_s = tl.where(mask, z, 0.0)
        a += tl.sum(y_s * y_t, 0)
        b += tl.sum(y_s * y_s, 0)
        mass += tl.sum(y_t * y_t, 0)
    else:
        mass += tl.sum(q, 0)
    if KIND == FKL:
        a += tl.sum(q * (log_q - under_q), 0)
    elif KIND == CE_SOFT:
        a += tl.sum(-q * under_q, 0)
    elif KIND == SCE:
        a += tl.sum(-q * under_q, 0)
        b += tl.sum(p * log_q, 0)
    elif KIND == RKL:
        b += tl.sum(p * (under_p - log_q), 0)
    elif KIND == PRODUCT:
        u = _log_product(log_p, log_q, mask, beta, power)
        new = tl.maximum(peak, tl.max(u, 0))
        line = tl.where(new > NONE, new, 0.0)
        shrink, t = tl.exp(peak - line), tl.exp(u - line)
        a = a * shrink - tl.sum(tl.where(t == 0, 0.0, t * log_p), 0)
        b = b * shrink + tl.sum(t, 0)
        peak = new
    elif KIND == JSD:
        r, s = _ratios(log_p, log_q, beta)
        a += tl.sum(q * tl.where(q == 0, 0.0, s), 0)
        b += tl.sum(p * tl.where(p == 0, 0.0, r), 0)
    return a, b, mass, peak


@triton.jit
def _divergence(KIND: tl.constexpr, a, b, mass, beta):
    """D from its sums, and cosine's two factors of the gradient."""
    own, theirs = 0.0, 0.0
    if KIND == SCE:
        d = (1 - beta) * a - beta * b
    elif KIND == JSD:
        d = beta * a + (1 - beta) * b
    elif KIND == RKL:
        d = b
    elif KIND == PRODUCT:
        d = a / tl.where(b == 0, 1.0, b)
    elif KIND == COSINE:
        norm = tl.sqrt(b)
        mine = tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)
        other = tl.sqrt(mass)
        theirs = 1.0 / (mine * tl.where(other < NORM_FLOOR, NORM_FLOOR, other))
        similar = a * theirs
        d = 1.0 - similar
        own = tl.where(norm < NORM_FLOOR, 0.0, similar / (mine * mine))
    else:
        d = a
    return d, own, theirs


@triton.jit
def _slope(
    KIND: tl.constexpr, z, log_p, p, log_q, q, teachers, row, cols, mask, invtau, beta, power, b, mass, peak, own,
    theirs,
):
    """A block of dD / d(z / tau)."""
    if KIND == RKL:
        g = p * (tl.where(p == 0, 0.0, log_p) - log_q - b)
    elif KIND == SCE:
        g = (1 - beta) * (mass * p - q) - beta * p * (log_q - b)
    elif KIND == JSD:
        r, _s = _ratios(log_p, log_q, beta)
        g = (1 - beta) * p * (tl.where(p == 0, 0.0, r) - b)
    elif KIND == PRODUCT:
        t = tl.exp(_log_product(log_p, log_q, mask, beta, power) - tl.where(b == 0, 0.0, peak))
        g = tl.where(b == 0, 0.0, p - t / tl.where(b == 0, 1.0, b))
    elif KIND == COSINE:
        g = (own * tl.where(mask, z, 0.0) - theirs * _raw(teachers, row, cols, mask)) / invtau
    else:
        g = mass * p - q
    return g


@triton.jit
def _row_kernel(
    student, stride, vocab, s_max, s_log_sum, s_one, teachers, target, keep, coef_kd, coef_ce, invtau, beta, power,
    o_kd, o_ce, o_stats, rows, first, o_grad, o_stride,
    KIND: tl.constexpr, FORMS: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr, STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = first + row  # among all rows; student, teachers and gradient begin with this chunk's
    kept = True
    if keep is not None:
        kept = tl.load(keep + at) != 0
    top, log_sum = tl.load(s_max + row), tl.load(s_log_sum + row)
    # sums: of terms of D, of terms under p, of q, of p log p, of q log q; largest entries and where they are
    a, b, mass, h_s, h_t = 0.0, 0.0, 0.0, 0.0, 0.0
    best_s, best_t = tl.full((), NONE, tl.float32), tl.full((), NONE, tl.float32)
    peak = tl.full((), NONE, tl.float32)  # of the logarithm of product's target; a and b are relative to it
    at_s, at_t = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < vocab
        z = tl.load(student + row * stride + cols, mask=mask, other=NONE).to(tl.float32)
        log_p = (z - top) * invtau - log_sum
        p = tl.exp(log_p)
        log_q, q = _mixture(teachers, FORMS, row, cols, mask, invtau)
        a, b, mass, peak = _add(
            KIND, z, log_p, p, log_q, q, teachers, row, cols, mask, beta, power, a, b, mass, peak
        )
        if STATISTICS:
            h_s -= tl.sum(p * tl.where(p == 0, 0.0, log_p), 0)
            h_t -= tl.sum(q * tl.where(q == 0, 0.0, log_q), 0)
            value, index = tl.max(z, 0), tl.argmax(z, 0)
            at_s = tl.where(value > best_s, start + index, at_s)
            best_s = tl.maximum(best_s, value)
            value, index = tl.max(tl.where(mask, q, -1.0), 0), tl.argmax(tl.where(mask, q, -1.0), 0)
            at_t = tl.where(value > best_t, start + index, at_t)
            best_t = tl.maximum(best_t, value)
    d, own, theirs = _divergence(KIND, a, b, mass, beta)
    tl.store(o_kd + at, tl.where(kept, d, 0.0))
    y = tl.full((), -1, tl.int64)
    one = log_sum
    ce = 0.0
    if HARD:
        y = tl.load(target + at)
        one = tl.load(s_one + row)
        z_y = tl.load(student + row * stride + y, mask=kept, other=0.0).to(tl.float32)
        ce = one - (z_y - top)
    tl.store(o_ce + at, tl.where(kept, ce, 0.0))
    if STATISTICS:
        tl.store(o_stats + at, tl.where(kept, h_s, 0.0))
        tl.store(o_stats + rows + at, tl.where(kept, h_t, 0.0))
        tl.store(o_stats + 2 * rows + at, tl.where(kept & (at_s == at_t), 1.0, 0.0))
    if GRADIENT:
        c = tl.load(coef_kd + at).to(tl.float32) * invtau
        hard = 0.0
        if HARD:
            hard = tl.load(coef_ce + at).to(tl.float32)
        tl.debug_barrier()  # the sweep may overwrite the logits, once every thread has read its label's
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < vocab
            z = tl.load(student + row * stride + cols, mask=mask, other=NONE).to(tl.float32)
            log_p = (z - top) * invtau - log_sum
            p = tl.exp(log_p)
            log_q, q = _mixture(teachers, FORMS, row, cols, mask, invtau)
            g = _slope(
                KIND, z, log_p, p, log_q, q, teachers, row, cols, mask, invtau, beta, power, b, mass, peak, own, theirs
            )
            g *= c
            if HARD:
                g += hard * (tl.exp((z - top) - one) - tl.where(cols == y, 1.0, 0.0))
            g = tl.where(kept, g, 0.0)
            tl.store(o_grad + row * o_stride + cols, g.to(o_grad.dtype.element_ty), mask=mask)
