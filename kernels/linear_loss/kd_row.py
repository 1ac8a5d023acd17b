"""The row kernel of kd_loss and linear_kd; kd.py says how rows reach it.

A slice of the student's row and of every teacher's is read once and stays in registers (slices.py) through three
steps: maxima and sums of exponentials, the sums of D, the gradient. What a kind is made of stands in one helper for
each of the last two; equations in reference/linear_loss/distillation.py. Logarithms are to the base 2, as the
hardware's: log p means log2 p here, and what leaves the kernel is turned into nats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import LN2, LOG2E, NO_INDEX
from .slices import all_published, own_slice, published

FKL, RKL, JSD, SCE, CE_SOFT, PRODUCT, COSINE = (tl.constexpr(i) for i in range(7))
LOGITS, PROBS, TOPK, LINEAR, LINEAR_BIAS = (tl.constexpr(i) for i in range(5))
LOG_FLOOR, REMAINDER_FLOOR = tl.constexpr(-1e4 * LOG2E.value), tl.constexpr(1e-12)
NORM_FLOOR = tl.constexpr(1e-8)
NONE = tl.constexpr(-float("inf"))
#: Numbers that a slice publishes besides two a teacher.
PUBLISHED = tl.constexpr(14)


@triton.jit
def _line(top):
    return tl.where(top > NONE, top, 0.0)


@triton.jit
def _read(teachers, m: tl.constexpr, form: tl.constexpr, row, cols, mask):
    """The slice of teacher m, [SLICE]; a top-k one has none."""
    values = teachers[0][m] + row * teachers[1][m]
    x = tl.full((), 0.0, tl.float32)
    if form == LOGITS:
        x = tl.load(values + cols, mask=mask, other=NONE).to(tl.float32)
    elif form == PROBS:
        x = tl.load(values + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _exponentials(x, rate):
    """max x and sum 2^(rate (x - max))."""
    top = tl.max(x, 0)
    return top, tl.sum(tl.exp2((x - _line(top)) * rate), 0)


@triton.jit
def _of_slices(tops, sums, rate):
    """max and log2 sum of the whole row."""
    line = _line(tl.max(tops, 0))
    factors = tl.where(tops > NONE, tl.exp2((tops - line) * rate), 0.0)
    return line, tl.log2(tl.sum(factors * sums, 0))


@triton.jit
def _teacher(teachers, m: tl.constexpr, form: tl.constexpr, x, top, log_sum, row, cols, mask, rate):
    """log q and q of teacher m, [SLICE]; -inf and 0 in masked columns."""
    if form == LOGITS:
        log_q = (x - top) * rate - log_sum
        q = tl.exp2(log_q)
    elif form == PROBS:
        q = x
        log_q = tl.log2(q)
    else:
        values = teachers[0][m] + row * teachers[1][m]
        rest = tl.load(teachers[4][m] + row)
        q = tl.where(mask, rest, 0.0)
        for k in range(teachers[3][m]):
            own = cols == tl.load(teachers[2][m] + row * teachers[3][m] + k)
            q += tl.where(own, tl.exp(tl.load(values + k).to(tl.float32)) - rest, 0.0)
        log_q = tl.log2(q)
    return log_q, q


@triton.jit
def _mixture(teachers, FORMS: tl.constexpr, read, tops, log_sums, row, cols, mask, rate):
    """log q, floored, and q of the mixture."""
    log_q, q = _teacher(teachers, 0, FORMS[0], read[0], tops[0], log_sums[0], row, cols, mask, rate)
    if len(FORMS) > 1:
        q *= teachers[5][0]
        log_q += tl.log2(teachers[5][0] + tl.zeros_like(log_q))
        for m in tl.static_range(1, len(FORMS)):
            log_m, q_m = _teacher(teachers, m, FORMS[m], read[m], tops[m], log_sums[m], row, cols, mask, rate)
            share = teachers[5][m]
            log_m += tl.log2(share + tl.zeros_like(log_m))
            q += share * q_m
            gap = tl.where(log_q == log_m, 0.0, tl.abs(log_q - log_m))
            log_q = tl.maximum(log_q, log_m) + tl.log2(1 + tl.exp2(-gap))
    return tl.maximum(log_q, LOG_FLOOR, propagate_nan=tl.PropagateNan.ALL), q


@triton.jit
def _ratios(log_p, log_q, beta):
    """log p - log m and log q - log m of m = beta q + (1 - beta) p; exactly 0 where the two are equal."""
    d = log_q - log_p
    u = tl.exp2(-tl.abs(d))
    over = tl.log2(tl.where(d > 0, beta + (1 - beta) * u, 1 - beta + beta * u))
    return -over - tl.maximum(d, 0.0), tl.minimum(d, 0.0) - over


@triton.jit
def _log_product(log_p, log_q, mask, beta, power):
    """beta log p + power log q; -inf where a factor is 0 and in masked columns. A power of 0 leaves its factor out."""
    q = tl.where(log_q == LOG_FLOOR, NONE, log_q)  # at the floor q is 0
    return tl.where(mask, tl.where(beta == 0, 0.0, beta * log_p) + tl.where(power == 0, 0.0, power * q), NONE)


@triton.jit
def _sums(KIND: tl.constexpr, x, log_p, p, log_q, q, other, mask, beta, power):
    """Of a slice: sums of D's terms (a), of those under p (b), of q (mass); product's are relative to its peak.

    ``other``: the first teacher's slice as it was read, which cosine takes."""
    a, b, mass = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    peak = tl.full((), NONE, tl.float32)
    under_p, under_q = tl.where(p == 0, 0.0, log_p), tl.where(q == 0, 0.0, log_p)
    if KIND == COSINE:
        y_s, y_t = tl.where(mask, x, 0.0), tl.where(mask, other, 0.0)
        a = tl.sum(y_s * y_t, 0)
        b = tl.sum(y_s * y_s, 0)
        mass = tl.sum(y_t * y_t, 0)
    else:
        mass = tl.sum(q, 0)
    if KIND == FKL:
        a = tl.sum(q * (log_q - under_q), 0)
    elif KIND == CE_SOFT:
        a = tl.sum(-q * under_q, 0)
    elif KIND == SCE:
        a = tl.sum(-q * under_q, 0)
        b = tl.sum(p * log_q, 0)
    elif KIND == RKL:
        b = tl.sum(p * (under_p - log_q), 0)
    elif KIND == PRODUCT:
        u = _log_product(log_p, log_q, mask, beta, power)
        peak = tl.max(u, 0)
        t = tl.exp2(u - _line(peak))
        a = -tl.sum(tl.where(t == 0, 0.0, t * log_p), 0)
        b = tl.sum(t, 0)
    elif KIND == JSD:
        r, s = _ratios(log_p, log_q, beta)
        a = tl.sum(q * tl.where(q == 0, 0.0, s), 0)
        b = tl.sum(p * tl.where(p == 0, 0.0, r), 0)
    return a, b, mass, peak


@triton.jit
def _divergence(KIND: tl.constexpr, a, b, mass, beta):
    """D in nats from its sums, and cosine's two factors of the gradient."""
    own, theirs = 0.0, 0.0
    if KIND == SCE:
        d = LN2 * ((1 - beta) * a - beta * b)
    elif KIND == JSD:
        d = LN2 * (beta * a + (1 - beta) * b)
    elif KIND == RKL:
        d = LN2 * b
    elif KIND == PRODUCT:
        d = LN2 * (a / tl.where(b == 0, 1.0, b))
    elif KIND == COSINE:
        norm = tl.sqrt(b)
        mine = tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)
        other = tl.sqrt(mass)
        theirs = 1.0 / (mine * tl.where(other < NORM_FLOOR, NORM_FLOOR, other))
        similar = a * theirs
        d = 1.0 - similar
        own = tl.where(norm < NORM_FLOOR, 0.0, similar / (mine * mine))
    else:
        d = LN2 * a
    return d, own, theirs


@triton.jit
def _slope(
    KIND: tl.constexpr, x, log_p, p, log_q, q, other, mask, invtau, beta, power, b, mass, peak, own, theirs,
):
    """dD / d(z / tau) of a slice."""
    if KIND == RKL:
        g = p * (tl.where(p == 0, 0.0, log_p) - log_q - b) * LN2
    elif KIND == SCE:
        g = (1 - beta) * (mass * p - q) - beta * LN2 * p * (log_q - b)
    elif KIND == JSD:
        r, _s = _ratios(log_p, log_q, beta)
        g = (1 - beta) * LN2 * p * (tl.where(p == 0, 0.0, r) - b)
    elif KIND == PRODUCT:
        t = tl.exp2(_log_product(log_p, log_q, mask, beta, power) - tl.where(b == 0, 0.0, peak))
        g = tl.where(b == 0, 0.0, p - t / tl.where(b == 0, 1.0, b))
    elif KIND == COSINE:
        g = (own * tl.where(mask, x, 0.0) - theirs * tl.where(mask, other, 0.0)) / invtau
    else:
        g = mass * p - q
    return g


@triton.jit
def _place(parts, i, SLICES: tl.constexpr, PADDED: tl.constexpr):
    """Where the largest of the numbers i stands, as the numbers i + 1 say."""
    best = published(parts, i, SLICES, PADDED, NONE)
    places = published(parts, i + 1, SLICES, PADDED, 0.0).to(tl.int32, bitcast=True)
    return tl.min(tl.where((best == tl.max(best, 0)) & (tl.arange(0, PADDED) < SLICES), places, NO_INDEX), 0)


@triton.jit
def _row_kernel(
    student, stride, vocab, width, teachers, target, keep, coef_kd, coef_ce, invtau, beta, power, o_kd, o_ce, o_stats,
    rows, first, o_grad, o_stride, parts, progress,
    KIND: tl.constexpr, FORMS: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr, STATISTICS: tl.constexpr,
    SLICE: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
):
    row, part = own_slice(progress, SLICES, STEP)
    at = first + row  # among all rows; student, teachers and gradient begin with this chunk's
    low = part * width
    high = tl.minimum(low + width, vocab)
    cols = low + tl.arange(0, SLICE)
    mask = cols < high
    rate = invtau * LOG2E
    x = tl.load(student + row * stride + cols, mask=mask, other=NONE).to(tl.float32)
    read = ()
    for m in tl.static_range(len(FORMS)):
        read += (_read(teachers, m, FORMS[m], row, cols, mask),)

    if STEP <= 0:  # maxima and sums of exponentials
        top, total = _exponentials(x, rate)
        hard_total = total
        if HARD:
            hard_total = tl.sum(tl.exp2((x - _line(top)) * LOG2E), 0)
        tops, totals = (), ()
        for m in tl.static_range(len(FORMS)):
            if FORMS[m] == LOGITS:
                top_m, total_m = _exponentials(read[m], rate)
            else:
                top_m, total_m = top, total  # nobody asks
            tops += (top_m,)
            totals += (total_m,)
    if SLICES > 1:
        parts += row * (PUBLISHED + 2 * len(FORMS)) * SLICES
        if STEP <= 0:
            tl.store(parts + part, top)
            tl.store(parts + SLICES + part, total)
            tl.store(parts + 2 * SLICES + part, hard_total)
            for m in tl.static_range(len(FORMS)):
                tl.store(parts + (PUBLISHED + 2 * m) * SLICES + part, tops[m])
                tl.store(parts + (PUBLISHED + 2 * m + 1) * SLICES + part, totals[m])
    if STEP != 0:
        if SLICES > 1:
            came = all_published(progress + 2 * row + 1, SLICES, STEP)
            all_tops = published(parts, 0, SLICES, PADDED, NONE)
            top, log_sum = _of_slices(all_tops, published(parts, 1, SLICES, PADDED, 0.0), rate)
            top, hard_sum = _of_slices(all_tops, published(parts, 2, SLICES, PADDED, 0.0), LOG2E)
            log_sum = tl.where(came, log_sum, float("nan"))
            tops, log_sums = (), ()
            for m in tl.static_range(len(FORMS)):
                top_m, log_m = _of_slices(
                    published(parts, PUBLISHED + 2 * m, SLICES, PADDED, NONE),
                    published(parts, PUBLISHED + 2 * m + 1, SLICES, PADDED, 0.0), rate,
                )  # fmt: skip
                tops += (top_m,)
                log_sums += (log_m,)
        else:
            top, log_sum, hard_sum = _line(top), tl.log2(total), tl.log2(hard_total)
            log_sums, lines = (), ()
            for m in tl.static_range(len(FORMS)):
                lines += (_line(tops[m]),)
                log_sums += (tl.log2(totals[m]),)
            tops = lines
        log_p = (x - top) * rate - log_sum
        p = tl.exp2(log_p)
        log_q, q = _mixture(teachers, FORMS, read, tops, log_sums, row, cols, mask, rate)

        kept = True
        if keep is not None:
            kept = tl.load(keep + at) != 0
        y = tl.full((), -1, tl.int64)
        if HARD:
            y = tl.load(target + at)
        peak = tl.full((), NONE, tl.float32)
        if STEP != 2:  # the sums of D
            a, b, mass, peak = _sums(KIND, x, log_p, p, log_q, q, read[0], mask, beta, power)
            if HARD:
                own_y = (y >= low) & (y < high) & kept
                z_y = tl.load(student + row * stride + y, mask=own_y, other=0.0).to(tl.float32)
                label = tl.where(own_y, z_y - top, 0.0)
            if STATISTICS:
                h_s = -tl.sum(p * tl.where(p == 0, 0.0, log_p), 0)
                h_t = -tl.sum(q * tl.where(q == 0, 0.0, log_q), 0)
                best_s, at_s = tl.max(x, 0), low + tl.argmax(x, 0)
                shown = tl.where(mask, q, -1.0)
                best_t, at_t = tl.max(shown, 0), low + tl.argmax(shown, 0)
        if SLICES > 1:
            if STEP != 2:
                into = parts + 3 * SLICES + part
                tl.store(into, a)
                tl.store(into + SLICES, b)
                tl.store(into + 2 * SLICES, mass)
                tl.store(into + 3 * SLICES, peak)
                if HARD:
                    tl.store(into + 4 * SLICES, label)
                if STATISTICS:
                    tl.store(into + 5 * SLICES, h_s)
                    tl.store(into + 6 * SLICES, h_t)
                    tl.store(into + 7 * SLICES, best_s)
                    tl.store(into + 8 * SLICES, at_s.to(tl.float32, bitcast=True))
                    tl.store(into + 9 * SLICES, best_t)
                    tl.store(into + 10 * SLICES, at_t.to(tl.float32, bitcast=True))
            if STEP != 1:
                came = all_published(progress + 2 * row + 1, 2 * SLICES, STEP)
                factors = 1.0
                if KIND == PRODUCT:
                    peaks = published(parts, 6, SLICES, PADDED, NONE)
                    peak = tl.max(peaks, 0)
                    factors = tl.where(peaks > NONE, tl.exp2(peaks - _line(peak)), 0.0)
                a = tl.sum(factors * published(parts, 3, SLICES, PADDED, 0.0), 0)
                b = tl.sum(factors * published(parts, 4, SLICES, PADDED, 0.0), 0)
                mass = tl.sum(published(parts, 5, SLICES, PADDED, 0.0), 0)
                mass = tl.where(came, mass, float("nan"))
                a, b = tl.where(came, a, float("nan")), tl.where(came, b, float("nan"))
                if HARD:
                    label = tl.sum(published(parts, 7, SLICES, PADDED, 0.0), 0)
                if STATISTICS:
                    h_s = tl.sum(published(parts, 8, SLICES, PADDED, 0.0), 0)
                    h_t = tl.sum(published(parts, 9, SLICES, PADDED, 0.0), 0)
                    at_s = _place(parts, 10, SLICES, PADDED)
                    at_t = _place(parts, 12, SLICES, PADDED)
        if STEP != 1:
            d, own, theirs = _divergence(KIND, a, b, mass, beta)
            writes = part == 0
            ce = 0.0
            if HARD:
                ce = hard_sum * LN2 - label
            tl.store(o_kd + at, tl.where(kept, d, 0.0), mask=writes)
            tl.store(o_ce + at, tl.where(kept, ce, 0.0), mask=writes)
            if STATISTICS:
                tl.store(o_stats + at, tl.where(kept, h_s * LN2, 0.0), mask=writes)
                tl.store(o_stats + rows + at, tl.where(kept, h_t * LN2, 0.0), mask=writes)
                tl.store(o_stats + 2 * rows + at, tl.where(kept & (at_s == at_t), 1.0, 0.0), mask=writes)
            if GRADIENT:
                c = tl.load(coef_kd + at).to(tl.float32) * invtau
                g = c * _slope(
                    KIND, x, log_p, p, log_q, q, read[0], mask, invtau, beta, power, b, mass, peak, own, theirs
                )
                if HARD:
                    hard = tl.load(coef_ce + at).to(tl.float32)
                    g += hard * (tl.exp2((x - top) * LOG2E - hard_sum) - tl.where(cols == y, 1.0, 0.0))
                g = tl.where(kept, g, 0.0)
                tl.debug_barrier()  # g may overwrite the logits, once every thread has read its label's
                tl.store(o_grad + row * o_stride + cols, g.to(o_grad.dtype.element_ty), mask=mask)
