"""linear_preference on a GPU: log-probabilities, a small kernel for the pairs' slopes, the gradient; see chunk.py.

The coefficients of a token wait for every token of its pair. So rows are brought together pair by pair and a chunk
holds whole pairs: three products in all. Where a pair alone exceeds a chunk, where a sequence is in two pairs or a CUDA
graph is captured, the logits are made twice: four products.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, capturing, cdiv, launch
from .ce import chunk_logp, launch_linear_ce
from .chunk import Chunks, most_rows, supports_chunk
from .gradient import chunk_gradient, launch_linear_loss_backward
from .packing import pick, spread

supports_linear_preference = supports_chunk
KINDS = ("dpo", "spin", "cdpo", "hinge", "ipo", "simpo", "orpo", "npo", "ga", "kto")
BLOCK = 128


@triton.jit
def softplus(x):
    e = tl.exp(-tl.abs(x))
    # log(1 + e), to the last digits where 1 + e rounds e away
    return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def log_odds(m):
    """log(e^m / (1 - e^m)) and its derivative, for m <= -1e-6."""
    low = tl.minimum(m, -1e-6)
    # 1 - e^m = -m (1 + m / 2 + ...) near 0, where the subtraction would cancel
    rest = tl.where(low > -1e-2, -low * (1.0 + low * (0.5 + low * (1.0 / 6.0 + low / 24.0))), 1.0 - tl.exp(low))
    return low - tl.log(rest), tl.where(m > -1e-6, 0.0, 1.0 / rest)


@triton.jit
def _pair_kernel(
    i_a, i_b, i_mean, i_label, i_kl, count, beta, gamma, eps, nll, o_loss, o_a, o_b, o_mean,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a pair (a, b are scores less the reference's) or of a sequence (a), and its derivatives."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    a = tl.load(i_a + at, mask=mask, other=0.0)
    b = tl.load(i_b + at, mask=mask, other=0.0)
    mean = tl.load(i_mean + at, mask=mask, other=0.0)
    # scores may be infinite: a term without weight is left out
    none = tl.zeros((BLOCK,), tl.float32)
    loss, d_a, d_b, d_mean = tl.where(none + nll == 0, 0.0, -nll * mean), none, none, none - nll
    if KIND <= 2 or KIND == 5:  # dpo, spin, cdpo, simpo
        u = beta * (a - b) - gamma
        loss += (1.0 - eps) * softplus(-u) + tl.where(none + eps == 0, 0.0, eps * softplus(u))
        d_a = -beta * ((1.0 - eps) * sigmoid(-u) - eps * sigmoid(u))
        d_b = -d_a
    elif KIND == 3:  # hinge
        x = 1.0 - beta * (a - b)
        loss += tl.where(x < 0, 0.0, x)
        d_a = tl.where(x > 0, -beta, 0.0)
        d_b = -d_a
    elif KIND == 4:  # ipo
        x = a - b - 0.5 / beta
        loss += x * x
        d_a = 2.0 * x
        d_b = -d_a
    elif KIND == 6:  # orpo
        odds_a, slope_a = log_odds(a)
        odds_b, slope_b = log_odds(b)
        u = odds_a - odds_b
        g = -beta * sigmoid(-u)
        loss += beta * softplus(-u) - mean
        d_a, d_b, d_mean = g * slope_a, -g * slope_b, d_mean - 1.0
    elif KIND == 7:  # npo
        loss = 2.0 / beta * softplus(beta * a)
        d_a = 2.0 * sigmoid(beta * a)
    elif KIND == 8:  # ga
        loss = a
        d_a = d_a + 1.0
    else:  # kto
        label = tl.load(i_label + at, mask=mask, other=0.0)
        sign = tl.where(label > 0, 1.0, tl.where(label < 0, -1.0, 0.0))
        p = sigmoid(-sign * (beta * a - tl.load(i_kl)))
        loss = tl.abs(label) * p
        d_a = -label * beta * p * (1.0 - p)
    tl.store(o_loss + at, loss, mask=mask)
    tl.store(o_a + at, d_a, mask=mask)
    tl.store(o_b + at, d_b, mask=mask)
    tl.store(o_mean + at, d_mean, mask=mask)


def _slopes(
    kind: str, settings: Any, x: Any, means: Any, pairs: Any, labels: Any, kl: Any, part: slice
) -> tuple[Any, Any, Any]:
    """Of some of the pairs (sequences, without pairs): losses, derivatives in all sequences' scores and means [S]."""
    if pairs is None:
        first = second = own = x[part]
        labels = None if labels is None else labels[part]
    else:
        pairs = pairs[part]
        first, second, own = x[pairs[:, 0]], x[pairs[:, 1]], means[pairs[:, 0]]
    loss, d_a, d_b, d_mean = (first.new_empty(first.shape) for _ in range(4))
    launch(
        _pair_kernel, cdiv(first.shape[0], BLOCK), x, first, second, own, labels, kl, first.shape[0], *settings, loss,
        d_a, d_b, d_mean, KIND=KINDS.index(kind), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    score, mean = x.new_zeros(x.shape), x.new_zeros(x.shape)
    if pairs is None:
        score[part] = d_a
        return loss, score, mean
    # index_put sorts, where index_add would add atomically in any order
    score = score.index_put((pairs[:, 0],), d_a, accumulate=True)
    score = score.index_put((pairs[:, 1],), d_b, accumulate=True)
    return loss, score, mean.index_put((pairs[:, 0],), d_mean, accumulate=True)


def _group_chunks(sizes: list[int], most: int) -> list[tuple[int, int, int, int]] | None:
    """(first row, rows, first group, end) of even chunks of whole groups; None if one alone has more than ``most``."""
    if max(sizes, default=0) > most:
        return None
    wanted = cdiv(sum(sizes), max(1, cdiv(sum(sizes), most)))
    found, row, rows, group = [], 0, 0, 0
    for i, size in enumerate(sizes):
        if rows and size and (rows + size > most or rows >= wanted):
            found.append((row, rows, group, i))
            row, rows, group = row + rows, 0, i
        rows += size
    found.append((row, rows, group, len(sizes)))
    return found


def _groups(used: Any, segments: Any, sequences: int, pairs: Any) -> tuple[Any, list[int]] | None:
    """Rows that count, pair after pair (the others' sequences after them), and how many each has.

    None where a sequence is in two pairs, or where the host may not wait for these numbers.
    """
    if capturing(used):
        return None
    group, count = segments, sequences
    if pairs is not None:
        number = segments.new_ones((sequences + pairs.shape[0],)).cumsum(0) - 1
        place = number[pairs.shape[0] :].clone()  # a sequence without a pair is a group of its own
        count += pairs.shape[0]
        for column in (0, 1):
            place[pairs[:, column]] = number[: pairs.shape[0]]
        own = (place[pairs] == number[: pairs.shape[0], None]).all() & (pairs[:, 0] != pairs[:, 1]).all()
        if not bool(own):
            return None
        group = place[segments]
    rows = used.nonzero().squeeze(1)
    group = group[rows]
    return rows[group.argsort(stable=True)], group.bincount(minlength=count).tolist()


def launch_linear_preference(*args: Any) -> tuple[Any, ...]:
    """Arguments of `linear_preference` -> its outputs."""
    target, ignored, weights, segments, counts = args[8:13]
    used = target != ignored
    own = used.float() if weights is None else weights.float().masked_fill(used.logical_not(), 0.0)
    found = _groups(own != 0, segments, counts.shape[0], args[14])
    chunks = None if found is None else _group_chunks(found[1], most_rows(args[7]))
    return _two_passes(args, own) if found is None or chunks is None else _one_pass(args, own, found[0], chunks)


def _one_pass(args: tuple[Any, ...], own: Any, rows: Any, chunks: list[tuple[int, int, int, int]]) -> tuple[Any, ...]:
    """A chunk holds whole pairs, so that its logits become dz in place."""
    (target, _, _, segments, counts, ref, pairs, labels, kl), total = args[8:17], own.shape[0]
    kind, settings, mean, scale, *need = args[17:]
    work = Chunks((pick(args[0], rows), args[1], args[2], pick(args[3], rows), *args[4:8]), tuple(need))
    ids, own, segments = pick(target, rows).unsqueeze(1), pick(own, rows), pick(segments, rows)
    coef, keep, (logp, lse, other) = own.new_zeros((work.rows, 1)), own != 0, (work.row() for _ in range(3))
    sums, size, losses = own.new_zeros(counts.shape), counts.float().clamp_min(1), own.new_zeros(())
    for (first, count, z, dz), (_, _, low, high) in zip(work.each([c[:2] for c in chunks]), chunks, strict=True):
        part = slice(first, first + count)
        chunk_logp(work, first, count, z, keep, ids, own, (logp, lse, other))
        sums = sums.index_put((segments[part],), logp[part] * own[part], accumulate=True)
        means = sums / size
        x = (means if mean else sums) if ref is None else (means if mean else sums) - ref.float()
        loss, slope, slope_mean = _slopes(kind, settings, x, means, pairs, labels, kl, slice(low, high))
        losses = losses + loss.sum()
        if work.any:
            slope = (slope / size if mean else slope) + slope_mean / size
            coef[part, 0] = scale * slope[segments[part]] * own[part]
            chunk_gradient(work, first, count, z, dz, lse, ids, coef)
    dhiddens, dheads, dbiases, dweights = work.gradients()
    return scale * losses, sums, spread(dhiddens, rows, total), dheads, dbiases, spread(dweights, rows, total)


def _two_passes(args: tuple[Any, ...], own: Any) -> tuple[Any, ...]:
    """Log-probabilities of all sequences first, then the logits again."""
    model, (target, _, _, segments, counts, ref, pairs, labels, kl) = args[:8], args[8:17]
    kind, settings, mean, scale, *need = args[17:]
    keep, ids = own != 0, target.unsqueeze(1)
    logp, lse = launch_linear_ce(
        *model, keep, ids, own.unsqueeze(1), None, None, own, 0.0, False, False, 0, 0, 0, False
    )[2:4]
    sums = own.new_zeros(counts.shape).index_put((segments,), logp * own, accumulate=True)
    size = counts.float().clamp_min(1)
    means = sums / size
    x = means if mean else sums
    x = x if ref is None else x - ref.float()
    losses, slope, slope_mean = _slopes(kind, settings, x, means, pairs, labels, kl, slice(None))
    slope = (slope / size if mean else slope) + slope_mean / size
    coef = scale * slope[segments] * own
    grads = launch_linear_loss_backward(*model, lse, ids, coef.unsqueeze(1), -coef, None, None, None, None, *need)
    return (scale * losses.sum(), sums, *grads)


def aot_cases() -> list[AotCase]:
    """The pair kernel of DPO, ORPO and KTO."""

    def run(kind: int) -> None:
        row, one = Meta((64,), "float32"), Meta((1,), "float32")
        label, kl = (row, one) if kind == 9 else (None, None)
        launch(
            _pair_kernel, 1, row, row, row, row, label, kl, 64, 0.1, 0.0, 0.0, 0.0, row, row, row, row, KIND=kind,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    return [AotCase(KINDS[kind], lambda kind=kind: run(kind)) for kind in (0, 6, 9)]
