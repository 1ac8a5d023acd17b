"""F(t) by one pass over a row, and the solver for the rows that the node sweep does not settle.

    t <- t - (G - sqrt(2 T)) G / (t Var),   G = sqrt(2 F),   inside a bracket that a step never leaves

Within one row's program; each evaluation reads the row once. Shifts are clamped to [-60, 60] around their centre.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import INF
from .fusion import difference, load_pair, load_row

FLOOR = tl.constexpr(3e-7)  # a KL below it is rounding error of the float32 sums
CLAMP = tl.constexpr(60.0)
STEPS = tl.constexpr(40)


@triton.jit
def clamped_shift(models, direction, centers, row, cols, mask, SOLVE: tl.constexpr):
    """x of one problem with every d_k clamped to 60 around its centre lse_k - lse_0, [BLOCK]."""
    count: tl.constexpr = len(models[2])
    x = tl.zeros(cols.shape, tl.float32)
    for k in tl.static_range(count):
        if SOLVE < 0 or k == SOLVE:
            expert, anti = load_pair(models, k, row, cols, mask)
            d = difference(expert, anti) - tl.load(centers + row * count + k)
            d = tl.where(d > CLAMP, CLAMP, tl.where(d < -CLAMP, -CLAMP, d))
            if SOLVE < 0 and direction is not None:
                d = d * tl.load(direction + row * count + k)
            x += d
    return x


@triton.jit
def tilted(models, vocab, direction, centers, row, t, log_base, SOLVE: tl.constexpr, BLOCK: tl.constexpr):
    """(F(t), variance of x under P_t) by one pass, float64; running maxima and sums a lane."""
    peak = tl.full((BLOCK,), -INF, tl.float32)
    s0 = tl.zeros((BLOCK,), tl.float32)
    s1, s2 = s0, s0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < vocab
        base = load_row(models[0], models[1], row, cols, mask)
        x = tl.where(base == -INF, 0.0, clamped_shift(models, direction, centers, row, cols, mask, SOLVE))
        e = base + t.to(tl.float32) * x
        top = tl.where((e > peak) | (e != e), e, peak)
        line = tl.where(top == -INF, 0.0, top)
        keep, w = tl.exp(peak - line), tl.exp(e - line)
        s0, s1, s2 = s0 * keep + w, s1 * keep + w * x, s2 * keep + w * x * x
        peak = top
    top = tl.max(peak, 0)
    f = tl.exp(peak - top).to(tl.float64)
    z0 = tl.sum(s0 * f, 0)
    m = tl.sum(s1 * f, 0) / z0
    variance = tl.sum(s2 * f, 0) / z0 - m * m
    kl = t.to(tl.float32).to(tl.float64) * m - (tl.log(z0) + top.to(tl.float64) - log_base)
    return tl.where(kl < 0, 0.0, kl), variance


@triton.jit
def newton(
    models, vocab, direction, centers, row, log_base, goal, alpha_max, allowed, SOLVE: tl.constexpr, BLOCK: tl.constexpr
):
    """(t, F(t), saturated) by repeated passes over the row."""
    end = tl.full((), 0.0, tl.float64) + alpha_max
    reach, _ = tilted(models, vocab, direction, centers, row, end, log_base, SOLVE, BLOCK)
    flat = (goal <= FLOOR) | (reach <= FLOOR)
    saturated = (reach <= goal) & (goal > FLOOR) & (reach > FLOOR)
    low, high = tl.full((), 0.0, tl.float64), end
    t = tl.where(saturated, end, tl.where(flat, 0.0, tl.minimum(end * 0.5, 1.0)))
    found = tl.where(saturated, reach, 0.0)
    left = tl.where(flat | saturated | (reach != reach) | (goal != goal), 0, STEPS)
    while left > 0:
        found, variance = tilted(models, vocab, direction, centers, row, t, log_base, SOLVE, BLOCK)
        done = (tl.abs(found - goal) <= allowed) | (left == 1)
        low, high = tl.where(found < goal, t, low), tl.where(found < goal, high, t)
        root = tl.sqrt(2.0 * found)
        step = t - (root - tl.sqrt(2.0 * goal)) * root / (t * variance)
        step = tl.where((step > low) & (step < high), step, 0.5 * (low + high))
        t = tl.where(done, t, step)
        left = tl.where(done, 0, left - 1)
    return t, tl.where(reach == reach, found, reach), saturated


@triton.jit
def grid_by_passes(
    models, vocab, direction, centers, row, log_base, goal, alpha_max, FIRST: tl.constexpr, NODES: tl.constexpr,
    SOLVE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The candidate closest to the goal, one pass a candidate."""
    zero = tl.full((), 0.0, tl.float64)
    best, t, achieved, found = zero + INF, zero, zero, zero
    for j in range(FIRST, NODES + 1):
        here = (zero + alpha_max) * j / NODES
        found, _ = tilted(models, vocab, direction, centers, row, here, log_base, SOLVE, BLOCK)
        misfit = tl.where(goal == INF, 0.0 * found - j, (found - goal) * (found - goal))
        better = misfit < best
        best, t, achieved = tl.where(better, misfit, best), tl.where(better, here, t), tl.where(better, found, achieved)
    t, achieved = tl.where(found == found, t, found), tl.where(found == found, achieved, found)
    return t, achieved, (found > FLOOR) & (found <= goal)
