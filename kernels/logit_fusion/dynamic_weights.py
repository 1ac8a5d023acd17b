"""dynamic_fusion_weights: t with F(t) = KL(softmax(z_L + t x) || softmax(z_L)) = T for every row.

The sweep (sweep.py) gives A and three derivatives at J + 1 nodes from one read; between two nodes A is the degree-7
Hermite polynomial P, and F(t_j + u h) = (t_j / h + u) P'(u) - P(u) is inverted by a 128-way search. The degree-5
polynomial differs from P by u^3 (1 - u)^3 (a + b u), which bounds the interpolation error; where the bound exceeds the
tolerance, or a shift leaves [-60, 60] (it is clamped then), the row's program iterates (newton.py), a pass a step.

One program a row merges and solves, scalars in float64. Floor: K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, AotCase, Group, Meta, dtype, launch, next_power
from .fusion import models_tuple, refuse_fusion
from .newton import CLAMP, FLOOR, grid_by_passes, newton
from .sweep import merge_nodes, merge_target, node_power, sweep

WAYS = tl.constexpr(128)


@triton.jit
def pick(values, j, at):
    """values[at] of a block."""
    return tl.sum(tl.where(j == at, values, 0.0), 0)


@triton.jit
def hermite_kl(u, ratio, a0, a1, a2, a3, c0, c1, c2, c3):
    """F = (t_j / h + u) P'(u) - P(u), P = a0 + a1 u + a2 u^2 + a3 u^3 + u^4 R(u - 1)."""
    w = u - 1.0
    r = c0 + w * (c1 + w * (c2 + w * c3))
    slope = c1 + w * (2.0 * c2 + 3.0 * w * c3)
    p = a0 + u * (a1 + u * (a2 + u * (a3 + u * r)))
    return (ratio + u) * (a1 + u * (2.0 * a2 + u * (3.0 * a3 + u * (4.0 * r + u * slope)))) - p


@triton.jit
def invert(goal, ratio, a0, a1, a2, a3, c0, c1, c2, c3):
    """(u, F(u)) with F(u) = goal on [0, 1]: three rounds of 128 points, then a line."""
    i = tl.arange(0, WAYS)
    low, width = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    for _ in range(3):
        f = hermite_kl(low + width * (i + 1).to(tl.float64) / WAYS, ratio, a0, a1, a2, a3, c0, c1, c2, c3)
        n = tl.min(tl.where((f >= goal) | (i == WAYS - 1), i, WAYS), 0)
        width = width / WAYS
        low = low + n.to(tl.float64) * width
    f_low = hermite_kl(low, ratio, a0, a1, a2, a3, c0, c1, c2, c3)
    f_high = hermite_kl(low + width, ratio, a0, a1, a2, a3, c0, c1, c2, c3)
    rise = f_high - f_low
    part = tl.where(rise > 0, (goal - f_low) / rise, 0.0)
    u = low + width * tl.where(part < 0, 0.0, tl.where(part > 1, 1.0, part))
    return u, hermite_kl(u, ratio, a0, a1, a2, a3, c0, c1, c2, c3)


@triton.jit
def between_nodes(goal, f, a, m, v, k, j, h, NODES: tl.constexpr):
    """(t, F(t), error bound) for a goal in (0, F_J)."""
    # the first node that reaches the goal ends the interval
    right = tl.minimum(tl.min(tl.where((f >= goal) & (j > 0), j, NODES), 0), NODES)
    left = right - 1
    a0, a1 = pick(a, j, left), h * pick(m, j, left)
    a2, a3 = h * h * pick(v, j, left) / 2.0, h * h * h * pick(k, j, left) / 6.0
    b0, b1 = pick(a, j, right), h * pick(m, j, right)
    b2, b3 = h * h * pick(v, j, right) / 2.0, h * h * h * pick(k, j, right) / 6.0
    # Taylor coefficients at u = 1 of what the cubic at u = 0 misses, divided by u^4
    g0, g1 = b0 - (a0 + a1 + a2 + a3), b1 - (a1 + 2.0 * a2 + 3.0 * a3)
    g2, g3 = b2 - (a2 + 3.0 * a3), b3 - a3
    c0 = g0
    c1 = g1 - 4.0 * c0
    c2 = g2 - 4.0 * c1 - 6.0 * c0
    c3 = g3 - 4.0 * c2 - 6.0 * c1 - 4.0 * c0
    # degree 5: third derivatives (over 6) at both ends against the measured ones
    q0 = b0 - (a0 + a1 + a2)
    q1 = b1 - (a1 + 2.0 * a2) - 3.0 * q0
    q2 = b2 - a2 - 3.0 * q1 - 3.0 * q0
    miss = tl.maximum(tl.abs(a3 - (q0 - q1 + q2)), tl.abs(b3 - (q0 + 3.0 * q1 + 3.0 * q2)))
    ratio = left.to(tl.float64)
    u, found = invert(goal, ratio, a0, a1, a2, a3, c0, c1, c2, c3)
    return (ratio + u) * h, found, miss * (0.085 * (ratio + 1.0) + 0.016)


@triton.jit
def solve(
    models, vocab, tiles, direction, centers, nodes, lines, row, goal, wild, alpha_max, tol,
    SOLVE: tl.constexpr, NODES: tl.constexpr, NP: tl.constexpr, FIRST: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(t, F(t), saturated) of one problem of one row."""
    a, m, v, k, log_base = merge_nodes(nodes, lines, tiles, alpha_max, NODES, NP, TILES)
    j = tl.arange(0, NP)
    h = (tl.full((), 0.0, tl.float64) + alpha_max) / NODES
    f = tl.minimum(j, NODES).to(tl.float64) * h * m - a  # [NP]
    f = tl.where(f < 0, 0.0, f)
    reach = pick(f, j, NODES)
    allowed = tol * tl.where(goal > 1.0, goal, 1.0)
    if FIRST >= 0:
        misfit = tl.where(goal == INF, -j.to(tl.float64), (f - goal) * (f - goal))
        misfit = tl.where((j >= FIRST) & (j <= NODES), misfit, INF)
        at = tl.min(tl.where(misfit == tl.min(misfit, 0), j, NODES), 0)
        t, found = at.to(tl.float64) * h, pick(f, j, at)
        saturated = (reach > FLOOR) & (reach <= goal)
        if wild:
            t, found, saturated = grid_by_passes(
                models, vocab, direction, centers, row, log_base, goal, alpha_max, FIRST, NODES, SOLVE, BLOCK
            )
    else:
        flat = (goal <= FLOOR) | (reach <= FLOOR)
        saturated = (reach <= goal) & (goal > FLOOR) & (reach > FLOOR)
        t, found, bound = between_nodes(goal, f, a, m, v, k, j, h, NODES)
        t = tl.where(saturated, h * NODES, tl.where(flat, 0.0, t))
        found = tl.where(saturated, reach, tl.where(flat, 0.0, found))
        if wild | ((bound > allowed) & (t > 0.0) & (t < h * NODES)):
            t, found, saturated = newton(
                models, vocab, direction, centers, row, log_base, goal, alpha_max, 0.5 * allowed, SOLVE, BLOCK
            )
    broken = (reach != reach) | (goal != goal)
    nan = tl.where(broken, float("nan"), 0.0)
    return t + nan, found + nan, tl.where(broken, 0, saturated.to(tl.int32))


@triton.jit
def _solve_kernel(
    models, vocab, tiles, i_targets, i_nodes, i_lines, given, direction, alpha_max, tol, scale,
    o_centers, o_alpha, o_target, o_achieved, o_saturated,
    SOLVES: tl.constexpr, NODES: tl.constexpr, NP: tl.constexpr, FIRST: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count: tl.constexpr = len(models[2])
    goal = tl.full((), 0.0, tl.float64)
    wild = goal > 1.0
    for k in tl.static_range(count):
        kl, center, low, high = merge_target(i_targets + (row * count + k) * 7 * tiles, tiles, TILES)
        beyond = (low - center < -CLAMP) | (high - center > CLAMP)
        if given is not None:
            kl = tl.load(given[0] + row * given[1] + k * given[2]).to(tl.float64)
        tl.store(o_target + row * count + k, kl.to(tl.float32))
        tl.store(o_centers + row * count + k, center.to(tl.float32))
        if SOLVES > 1:
            tl.debug_barrier()
            at = row * SOLVES + k
            t, found, saturated = solve(
                models, vocab, tiles, direction, o_centers, i_nodes + at * 4 * (NODES + 1) * tiles,
                i_lines + at * 2 * tiles,
                row, kl, beyond, alpha_max, tol, k, NODES, NP, FIRST, TILES, BLOCK,
            )
            tl.store(o_alpha + at, (t * scale).to(tl.float32))
            tl.store(o_achieved + at, found.to(tl.float32))
            tl.store(o_saturated + at, saturated.to(tl.int8))
        else:
            goal += kl / count
            wild = wild | beyond
    if SOLVES == 1:
        tl.debug_barrier()
        t, found, saturated = solve(
            models, vocab, tiles, direction, o_centers, i_nodes + row * 4 * (NODES + 1) * tiles,
            i_lines + row * 2 * tiles,
            row, goal, wild, alpha_max, tol, -1, NODES, NP, FIRST, TILES, BLOCK,
        )
        tl.store(o_achieved + row, found.to(tl.float32))
        for k in tl.static_range(count):
            u = 1.0
            if direction is not None:
                u = tl.load(direction + row * count + k)
            tl.store(o_alpha + row * count + k, (t * u).to(tl.float32))
            tl.store(o_saturated + row * count + k, saturated.to(tl.int8))


@triton.jit
def _direction_kernel(
    tiles, i_targets, source, o_direction, ONES: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr
):
    """u, largest entry 1, from given numbers or from T_k; a row of zeros gives ones (ONES) or zeros."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 0.0, tl.float64)
    for twice in tl.static_range(2):
        for k in tl.static_range(COUNT):
            if source is not None:
                u = tl.load(source[0] + row * source[1] + k * source[2]).to(tl.float64)
            else:
                u, _, _, _ = merge_target(i_targets + (row * COUNT + k) * 7 * tiles, tiles, TILES)
            if twice == 0:
                largest = tl.where((u > largest) | (u != u), u, largest)
            else:
                scaled = tl.where(largest == INF, tl.where(u == INF, 1.0, 0.0), u / largest)
                scaled = tl.where(largest == 0.0, 1.0 if ONES else 0.0, scaled)
                tl.store(o_direction + row * COUNT + k, scaled.to(tl.float32))


def launch_dynamic_fusion_weights(given: Any) -> tuple[Any, Any, Any, Any]:
    """Arguments of `dynamic_fusion_weights` -> (alpha, target_kl, achieved_kl, saturated)."""
    base, vocab_size, alpha_max, nodes = given.base, given.vocab_size, given.alpha_max, given.nodes
    direction, direction_kind = given.direction, given.direction_kind
    rows, count, f32 = base.shape[0], len(given.experts), dtype(base, "float32")
    models = models_tuple(base, given.experts, given.anti)
    solves = count if given.multi == 1 else 1
    goal = None if given.target_kl is None else (given.target_kl, *given.target_kl.stride())
    u, targets = None, None
    if direction_kind != 0 and solves == 1:
        u = base.new_empty((rows, count), dtype=f32)
        source = goal if direction_kind == 1 else (direction, *direction.stride())
        tiles = 1
        if source is None:  # u follows the targets: one more pass finds those first
            targets, _, _, tiles = sweep(models, vocab_size, alpha_max, 0, 0, None, f32)
        launch(
            _direction_kernel, rows, base, tiles, targets, source, u, ONES=direction_kind == 1, COUNT=count,
            TILES=next_power(tiles),
        )
    targets, sums, lines, tiles = sweep(models, vocab_size, alpha_max, nodes, solves, u, f32)
    alpha, target, centers = (base.new_empty((rows, count), dtype=f32) for _ in range(3))
    achieved = base.new_empty((rows, solves), dtype=f32)
    saturated = base.new_empty((rows, count), dtype=dtype(base, "bool"))
    launch(
        _solve_kernel, rows, base, models, vocab_size, tiles, targets, sums, lines, goal, u, float(alpha_max),
        float(given.tol), 1.0 / count if given.average and given.multi == 1 else 1.0, centers, alpha,
        target, achieved, saturated, SOLVES=solves, NODES=nodes, NP=node_power(nodes), FIRST=given.first_candidate,
        TILES=next_power(tiles), BLOCK=1024,
    )
    return alpha, target, achieved, saturated


def supports_dynamic_fusion_weights(given: Any, *_: Any) -> str | None:
    """The reason the kernels cannot serve a call, or None."""
    if given.multi == 2:
        return "the product grid is for comparison only and served by the reference"
    return refuse_fusion(given)


def solve_of(base: Any, experts: Any, anti: Any, **changes: Any) -> Group:
    """The arguments of ahead-of-time cases."""
    usual = Group(
        base=base, experts=experts, anti=anti, alpha_max=2.0, nodes=16, first_candidate=-1, tol=1e-4, multi=0,
        direction_kind=0, direction=None, average=False, target_kl=None, vocab_size=base.shape[1],
    )
    return usual._replace(**changes)


def aot_cases() -> list[AotCase]:
    """One expert at the default 16 nodes, the paper's grid, two decoupled experts, a ray along the targets."""

    def case(kind: str, vocab_size: int, count: int, nodes: int, first: int, multi: int, direction: int) -> None:
        base, anti, *experts = (Meta((8, vocab_size), kind) for _ in range(count + 2))
        launch_dynamic_fusion_weights(solve_of(
            base, experts, [anti], nodes=nodes, first_candidate=first, multi=multi, direction_kind=direction
        ))  # fmt: skip

    return [
        AotCase("bf16-k1-v151936-j16", lambda: case("bfloat16", 151936, 1, 16, -1, 0, 0)),
        AotCase("bf16-k1-v151936-grid20", lambda: case("bfloat16", 151936, 1, 20, 1, 0, 0)),
        AotCase("fp32-k2-v32000-decoupled", lambda: case("float32", 32000, 2, 16, -1, 1, 0)),
        AotCase("fp32-k2-v32000-ray-targets", lambda: case("float32", 32000, 2, 16, -1, 0, 1)),
    ]
