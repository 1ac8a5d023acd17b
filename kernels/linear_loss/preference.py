"""linear_preference on a GPU: log-probabilities, a small kernel for the pairs' slopes, the gradient; see chunk.py.

The coefficients of a token wait for every token of its pair, so the logits are made twice: four products in all.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch
from .ce import launch_linear_ce
from .chunk import supports_chunk
from .gradient import launch_linear_loss_backward

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
    loss, d_a, d_b, d_mean = -nll * mean, a * 0.0, a * 0.0, a * 0.0 - nll
    if KIND <= 2 or KIND == 5:  # dpo, spin, cdpo, simpo
        u = beta * (a - b) - gamma
        loss += (1.0 - eps) * softplus(-u) + eps * softplus(u)
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


def _slopes(kind: str, settings: Any, x: Any, means: Any, pairs: Any, labels: Any, kl: Any) -> tuple[Any, Any, Any]:
    """(losses, derivative in a sequence's score [S], derivative in its mean [S])."""
    first = x if pairs is None else x[pairs[:, 0]]
    second = x if pairs is None else x[pairs[:, 1]]
    own = means if pairs is None else means[pairs[:, 0]]
    loss, d_a, d_b, d_mean = (first.new_empty(first.shape) for _ in range(4))
    launch(
        _pair_kernel, cdiv(first.shape[0], BLOCK), x, first, second, own, labels, kl, first.shape[0], *settings, loss,
        d_a, d_b, d_mean, KIND=KINDS.index(kind), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if pairs is None:
        return loss, d_a, x.new_zeros(x.shape)
    # index_put sorts, where index_add would add atomically in any order
    score = x.new_zeros(x.shape).index_put((pairs[:, 0],), d_a, accumulate=True)
    score = score.index_put((pairs[:, 1],), d_b, accumulate=True)
    return loss, score, x.new_zeros(x.shape).index_put((pairs[:, 0],), d_mean, accumulate=True)


def launch_linear_preference(*args: Any) -> tuple[Any, ...]:
    """Arguments of `linear_preference` -> its outputs."""
    model, (target, ignored, weights, segments, counts, ref, pairs, labels, kl) = args[:8], args[8:17]
    kind, settings, mean, scale, *need = args[17:]
    keep, ids = target != ignored, target.unsqueeze(1)
    single = args[0][0].new_zeros((0,)).float()
    own = keep.to(single.dtype) if weights is None else keep * weights.float()
    keep = own != 0
    logp, lse = launch_linear_ce(
        *model, keep, ids, own.unsqueeze(1), None, None, own, 0.0, False, False, 0, 0, 0, False
    )[2:4]
    sums = single.new_zeros(counts.shape).index_put((segments,), logp * own, accumulate=True)
    size = counts.float().clamp_min(1)
    means = sums / size
    x = means if mean else sums
    x = x if ref is None else x - ref.float()
    losses, slope, slope_mean = _slopes(kind, settings, x, means, pairs, labels, kl)
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
