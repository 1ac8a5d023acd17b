"""projected_step: Adam's moments in a subspace, what lies outside scaled by norms, and the step, between two products.

The products are the library's, in float32. The passes work on lines, the rows of R if P stands on the right, else its
columns: a program owns a few and goes along them. R: read once, moments read and written, psi written, sums of squares
of a line; G: read once for its sums; one program makes phi and |S| of all lines; then psi - phi R; behind the second
product p = keep p - rate (back + phi G), all read once. Floor: G read twice, p read and written once, 4 m n r FLOPs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, cdiv, dtype, launch

BLOCK = 1024
#: (lines, entries) of a tile: along rows, along columns
SHAPES = {True: (2, 512), False: (64, 16)}


@triton.jit
def _number(scalars, i: tl.constexpr):
    return tl.full((), scalars[i], tl.float32)


@triton.jit
def _tile(lines, entries, step_line, step_entry, start, LINES: tl.constexpr, ENTRIES: tl.constexpr):
    """Places of a tile, which of them exist, and the lines."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    entry = start + tl.arange(0, ENTRIES)
    at = line[:, None] * step_line + entry.to(tl.int64)[None, :] * step_entry
    return at, (line[:, None] < lines) & (entry[None, :] < entries), line


@triton.jit
def _moments_kernel(
    low, first, second, scalars, lines, entries, step_line, step_entry, o_first, o_second, o_psi, o_sum_psi, o_sum_low,
    LINES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    of_psi, of_low = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    for start in range(0, entries, ENTRIES):
        at, mask, _ = _tile(lines, entries, step_line, step_entry, start, LINES, ENTRIES)
        r = tl.load(low + at, mask=mask, other=0.0)
        m = _number(scalars, 0) * tl.load(first + at, mask=mask, other=0.0) + _number(scalars, 1) * r
        v = _number(scalars, 2) * tl.load(second + at, mask=mask, other=0.0) + _number(scalars, 3) * r * r
        psi = m / (tl.sqrt_rn(v) + _number(scalars, 4))
        psi = tl.where(mask, psi, 0.0)
        tl.store(o_first + at, m, mask=mask)
        tl.store(o_second + at, v, mask=mask)
        tl.store(o_psi + at, psi, mask=mask)
        of_psi += tl.sum(psi * psi, 1)
        of_low += tl.sum(r * r, 1)
    tl.store(o_sum_psi + line, of_psi, mask=line < lines)
    tl.store(o_sum_low + line, of_low, mask=line < lines)


@triton.jit
def _squares_kernel(
    grad, lines, entries, step_line, step_entry, o_sums, LINES: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    sums = tl.zeros((LINES,), tl.float32)
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    for start in range(0, entries, ENTRIES):
        at, mask, _ = _tile(lines, entries, step_line, step_entry, start, LINES, ENTRIES)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(g * g, 1)
    tl.store(o_sums + line, sums, mask=line < lines)


@triton.jit
def _phi(psi, low):
    return tl.sqrt_rn(psi) / (tl.sqrt_rn(low) + 1e-8)


@triton.jit
def _left(grad, low, share):
    """What lies outside the subspace of sums of squares; NaN stays."""
    left = grad - share * low
    return tl.where(left < 0, 0.0, left)


@triton.jit
def _factors_kernel(
    sum_psi, sum_low, sum_grad, previous, scalars, lines, o_phi, o_norm, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    share, limit = _number(scalars, 0), _number(scalars, 1)
    a, b, c = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, lines, BLOCK):
        line = start + tl.arange(0, BLOCK)
        psi = tl.load(sum_psi + line, mask=line < lines, other=0.0)
        low = tl.load(sum_low + line, mask=line < lines, other=0.0)
        grad = tl.load(sum_grad + line, mask=line < lines, other=0.0)
        if WHOLE:
            a, b, c = a + psi, b + low, c + grad
        else:
            phi = _phi(psi, low)
            a += phi * phi * _left(grad, low, share)
    if WHOLE:
        low = tl.sum(b, 0)
        every = _phi(tl.sum(a, 0), low)
        square = every * every * _left(tl.sum(c, 0), low, share)
    else:
        every = 0.0
        square = tl.sum(a, 0)
    size, by = tl.sqrt_rn(square), 1.0
    if previous is not None:
        growth = size / (tl.load(previous).to(tl.float32) + 1e-8)
        by = tl.where(limit > 0, tl.where(growth <= limit, limit, growth) / limit, 1.0)
    tl.store(o_norm, size / by)
    for start in range(0, lines, BLOCK):
        line = start + tl.arange(0, BLOCK)
        if WHOLE:
            phi = tl.zeros((BLOCK,), tl.float32) + every
        else:
            psi = tl.load(sum_psi + line, mask=line < lines, other=0.0)
            phi = _phi(psi, tl.load(sum_low + line, mask=line < lines, other=0.0))
        tl.store(o_phi + line, phi / by, mask=line < lines)


@triton.jit
def _inside_kernel(psi, low, phi, o_inside, total, columns, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    line = at // columns if BY_ROW else at % columns
    part = tl.load(phi + line, mask=mask, other=0.0) * tl.load(low + at, mask=mask, other=0.0)
    tl.store(o_inside + at, tl.load(psi + at, mask=mask, other=0.0) - part, mask=mask)


@triton.jit
def _update_kernel(p, grad, back, phi, scalars, o_p, total, columns, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    moved = _number(scalars, 2) * tl.load(back + at, mask=mask, other=0.0)
    if phi is not None:
        line = at // columns if BY_ROW else at % columns
        moved += tl.load(phi + line, mask=mask, other=0.0) * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    kept = _number(scalars, 0) * tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_p + at, (kept - _number(scalars, 1) * moved).to(o_p.dtype.element_ty), mask=mask)


def _product(a: Any, b: Any) -> Any:
    if isinstance(a, Meta):
        return Meta((a.shape[0], b.shape[1]), "float32")
    return a.float().matmul(b.float())


def _turned(x: Any) -> Any:
    return Meta(x.shape[::-1], "float32") if isinstance(x, Meta) else x.t()


def launch_projected_step(
    p: Any, grad: Any, basis: Any, exp_avg: Any, exp_avg_sq: Any, previous: Any, rule: Any
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `projected_step` -> (p, exp_avg, exp_avg_sq, norm)."""
    m, n = p.shape
    right, whole = rule.right, dtype(p, "float32")
    low = _product(grad, basis) if right else _product(_turned(basis), grad)
    rows, columns = low.shape
    lines, entries, steps = (rows, columns, (columns, 1)) if right else (columns, rows, (1, columns))
    height, width = SHAPES[bool(right)]
    first, second, psi = (exp_avg.new_empty(exp_avg.shape) for _ in range(3))
    of_psi, of_low, of_grad, phi = (basis.new_empty((lines,), dtype=whole) for _ in range(4))
    rates = (rule.beta1, 1 - rule.beta1, rule.beta2, 1 - rule.beta2, rule.eps)
    launch(
        _moments_kernel, cdiv(lines, height), p, low, exp_avg, exp_avg_sq, rates, lines, entries, *steps, first, second,
        psi, of_psi, of_low, LINES=height, ENTRIES=width,
    )  # fmt: skip
    norm, inside = basis.new_zeros(() if rule.outside else (0,), dtype=whole), psi
    if rule.outside:
        across, along = (n, (n, 1)) if right else (m, (1, n))
        launch(
            _squares_kernel, cdiv(lines, height), p, grad, lines, across, *along, of_grad, LINES=height, ENTRIES=width
        )  # fmt: skip
        launch(
            _factors_kernel, 1, p, of_psi, of_low, of_grad, previous, (2 * rule.scale - rule.scale**2, rule.limit),
            lines, phi, norm, WHOLE=rule.outside == 2, BLOCK=BLOCK,
        )  # fmt: skip
        inside = psi.new_empty(psi.shape)
        launch(
            _inside_kernel, cdiv(rows * columns, BLOCK), p, psi, low, phi, inside, rows * columns, columns,
            BY_ROW=right, BLOCK=BLOCK,
        )  # fmt: skip
    back = _product(inside, _turned(basis)) if right else _product(basis, inside)
    moved = p.new_empty((m, n))
    launch(
        _update_kernel, cdiv(m * n, BLOCK), p, p, grad, back, phi if rule.outside else None,
        (rule.keep, rule.rate, rule.scale), moved, m * n, n, BY_ROW=right, BLOCK=BLOCK,
    )  # fmt: skip
    return moved, first, second, norm


def aot_cases() -> list[AotCase]:
    """A matrix of a 7B model from both sides, in bf16 and fp32, a first step and a later one."""

    def case(name: str, right: bool, outside: int, before: bool) -> AotCase:
        def run() -> None:
            p, r = Meta((4096, 4096), name), 64
            basis, state = Meta((4096, r), "float32"), (4096, r) if right else (r, 4096)
            rule = Group(
                beta1=0.9, beta2=0.999, eps=1e-6, rate=1e-3, keep=0.9, scale=0.25, limit=1.01, right=right,
                outside=outside,
            )  # fmt: skip
            moments = Meta(state, "float32")
            launch_projected_step(p, p, basis, moments, moments, Meta((), "float32") if before else None, rule)

        return AotCase(f"{name}-{'right' if right else 'left'}-{outside}", run)

    return [
        case("float32", True, 1, True), case("bfloat16", False, 1, True), case("bfloat16", True, 2, False),
        case("bfloat16", True, 0, False),
    ]  # fmt: skip
