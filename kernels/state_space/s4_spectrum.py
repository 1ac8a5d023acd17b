"""s4_spectrum on a GPU: four Cauchy sums of one feature and channel at NODES nodes, Woodbury's identity in registers.

Poles, weights and nodes are made in float64; distances are differences of numbers in two float32 parts, sums are in
float32. Backward: the gradients of the sums at each node, ``[H, 2 + 2 C, 2, nodes]``; the sums over nodes of each row
and pole; and from those the parameters' gradients, in float64. Floor: 34 operations and 2 reciprocals a node and pole;
the result is written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch
from .numbers import keep_pair, pair, rounded, turn

#: Nodes and poles of a tile.
NODES, POLES = 64, 8
#: Rows of weights, of which pp and bp are every channel's.
PP, BP, BC, PC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _nodes(at, length):
    """``y`` of nodes i y in two float32 parts."""
    c, s = turn(at.to(tl.float64) / (2.0 * length))
    y = 2.0 * s / c
    first = y.to(tl.float32)
    return first, (y - first.to(tl.float64)).to(tl.float32)


@triton.jit
def _weight(b, p, c, h, row, n, M, step, which):
    """A row's weights of poles n, complex float64; row is the channel's place in c ``[C H]``."""
    br, bi = pair(b, h, n, M)
    pr, pi = pair(p, h, n, M)
    cr, ci = pair(c, row, n, M)
    xr, xi = tl.where((which == PP) | (which == PC), pr, br), tl.where((which == PP) | (which == PC), pi, bi)
    zr, zi = tl.where(which <= BP, pr, cr), tl.where(which <= BP, -pi, ci)
    return step * (xr * zr - xi * zi), step * (xr * zi + xi * zr)


@triton.jit
def _fractions(y, y_left, a, h, n, M, step):
    """p + P, p - P, q + Q and q - Q of poles n ``[POLES, 1]`` and nodes ``[1, NODES]``; and p, P, q, Q themselves."""
    re, im = pair(a, h, n, M)
    re, im = tl.where(n < M, step * re, -1.0), step * im  # past the last pole: any that is no node
    w = im.to(tl.float32)
    left = (im - w.to(tl.float64)).to(tl.float32)
    d = -re.to(tl.float32)[:, None]
    e = (y[None, :] - w[:, None]) + (y_left[None, :] - left[:, None])
    f = (y[None, :] + w[:, None]) + (y_left[None, :] + left[:, None])
    one, two = 1.0 / (d * d + e * e), 1.0 / (d * d + f * f)
    return d * one, d * two, e * one, f * two


@triton.jit
def _row(p, P, q, Q, vr, vi):
    """A row's sums over the poles of a tile."""
    vr, vi = vr.to(tl.float32)[:, None], vi.to(tl.float32)[:, None]
    return tl.sum(vr * (p + P) + vi * (q - Q), 0), tl.sum(vi * (p - P) - vr * (q + Q), 0)


@triton.jit
def _sums(y, y_left, a, b, p, c, h, row, M, step, NODES: tl.constexpr, POLES: tl.constexpr):
    """The sums pp, bp, bc and pc at nodes."""
    zero = tl.zeros((NODES,), tl.float32)
    ppr, ppi, bpr, bpi, bcr, bci, pcr, pci = zero, zero, zero, zero, zero, zero, zero, zero
    for n0 in range(0, M, POLES):
        n = n0 + tl.arange(0, POLES)
        f, F, g, G = _fractions(y, y_left, a, h, n, M, step)
        vr, vi = _weight(b, p, c, h, row, n, M, step, PP)
        sr, si = _row(f, F, g, G, vr, vi)
        ppr, ppi = ppr + sr, ppi + si
        vr, vi = _weight(b, p, c, h, row, n, M, step, BP)
        sr, si = _row(f, F, g, G, vr, vi)
        bpr, bpi = bpr + sr, bpi + si
        vr, vi = _weight(b, p, c, h, row, n, M, step, BC)
        sr, si = _row(f, F, g, G, vr, vi)
        bcr, bci = bcr + sr, bci + si
        vr, vi = _weight(b, p, c, h, row, n, M, step, PC)
        sr, si = _row(f, F, g, G, vr, vi)
        pcr, pci = pcr + sr, pci + si
    return ppr, ppi, bpr, bpi, bcr, bci, pcr, pci


@triton.jit
def _over(xr, xi, ur, ui):
    """x / (1 + u)."""
    ur += 1.0
    size = 1.0 / (ur * ur + ui * ui)
    return (xr * ur + xi * ui) * size, (xi * ur - xr * ui) * size


@triton.jit
def _forward_kernel(
    a, b, p, c, dt, out, H, M, length, NODES: tl.constexpr, POLES: tl.constexpr
):  # fmt: skip
    columns = length // 2 + 1
    blocks = tl.cdiv(columns, NODES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * NODES + tl.arange(0, NODES)
    h, nodes = row % H, (length + 1) // 2
    step = tl.load(dt + h).to(tl.float64)
    y, y_left = _nodes(tl.minimum(at, nodes - 1), length)
    ppr, ppi, bpr, bpi, bcr, bci, pcr, pci = _sums(y, y_left, a, b, p, c, h, row, M, step, NODES, POLES)
    tr, ti = _over(bpr, bpi, ppr, ppi)
    kr, ki = bcr - (tr * pcr - ti * pci), bci - (tr * pci + ti * pcr)
    half = y / 2.0
    last = 0.0
    for n0 in range(0, M, POLES):
        n = n0 + tl.arange(0, POLES)
        vr, _ = _weight(b, p, c, h, row, n, M, step, BC)
        last += tl.sum(vr, 0).to(tl.float32)
    to = out + (row * columns + at) * 2
    tl.store(to, tl.where(at < nodes, kr - half * ki, last), mask=at < columns)
    tl.store(to + 1, tl.where(at < nodes, ki + half * kr, 0.0), mask=at < columns)


@triton.jit
def _nodes_kernel(
    grad, a, b, p, c, dt, rows, H, M, C, length, NODES: tl.constexpr, POLES: tl.constexpr
):  # fmt: skip
    """Gradients of the sums, ``[H, 2 + 2 C, 2, nodes]``."""
    nodes, columns = (length + 1) // 2, length // 2 + 1
    blocks = tl.cdiv(nodes, NODES)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * NODES + tl.arange(0, NODES)
    live = at < nodes
    step = tl.load(dt + h).to(tl.float64)
    y, y_left = _nodes(tl.minimum(at, nodes - 1), length)
    half = y / 2.0
    to = rows + h * (2 + 2 * C) * 2 * nodes + at
    zero = tl.zeros((NODES,), tl.float32)
    ppr, ppi, bpr, bpi = zero, zero, zero, zero
    for k in range(C):
        row = h + k * H
        ur, ui, xr, xi, _, _, wr, wi = _sums(y, y_left, a, b, p, c, h, row, M, step, NODES, POLES)
        xr, xi = _over(xr, xi, ur, ui)
        wr, wi = _over(wr, wi, ur, ui)
        br = tl.load(grad + (row * columns + at) * 2, mask=live, other=0.0)
        bi = tl.load(grad + (row * columns + at) * 2 + 1, mask=live, other=0.0)
        gr, gi = br + half * bi, bi - half * br
        sr, si = -(xr * gr + xi * gi), -(xr * gi - xi * gr)
        bpr, bpi = bpr - (wr * gr + wi * gi), bpi - (wr * gi - wi * gr)
        ppr, ppi = ppr - (wr * sr + wi * si), ppi - (wr * si - wi * sr)
        own = to + (2 + 2 * k) * 2 * nodes
        tl.store(own, gr, mask=live)
        tl.store(own + nodes, gi, mask=live)
        tl.store(own + 2 * nodes, sr, mask=live)
        tl.store(own + 3 * nodes, si, mask=live)
    tl.store(to, ppr, mask=live)
    tl.store(to + nodes, ppi, mask=live)
    tl.store(to + 2 * nodes, bpr, mask=live)
    tl.store(to + 3 * nodes, bpi, mask=live)


@triton.jit
def _poles_kernel(
    rows, a, dt, sums, H, M, R, length, poles, NODES: tl.constexpr, POLES: tl.constexpr
):  # fmt: skip
    """Of each row, over the nodes: its weights' gradient, and the same of the squares, ``[H, R, 4, M]``."""
    nodes = (length + 1) // 2
    row = (tl.program_id(0) // poles).to(tl.int64)  # of [H, R]
    n = tl.program_id(0) % poles * POLES + tl.arange(0, POLES)
    h = row // R
    step = tl.load(dt + h).to(tl.float64)
    zero = tl.zeros((POLES,), tl.float64)
    vr, vi, tr, ti = zero, zero, zero, zero
    for l0 in range(0, nodes, NODES):
        at = l0 + tl.arange(0, NODES)
        y, y_left = _nodes(tl.minimum(at, nodes - 1), length)
        gr = tl.load(rows + row * 2 * nodes + at, mask=at < nodes, other=0.0)[None, :]
        gi = tl.load(rows + (row * 2 + 1) * nodes + at, mask=at < nodes, other=0.0)[None, :]
        p, P, q, Q = _fractions(y, y_left, a, h, n, M, step)
        vr += tl.sum(gr * (p + P) - gi * (q + Q), 1).to(tl.float64)
        vi += tl.sum(gr * (q - Q) + gi * (p - P), 1).to(tl.float64)
        p, P, q, Q = (p - q) * (p + q), (P - Q) * (P + Q), 2.0 * p * q, 2.0 * P * Q
        tr += tl.sum(gr * (p + P) - gi * (q + Q), 1).to(tl.float64)
        ti += tl.sum(gr * (q - Q) + gi * (p - P), 1).to(tl.float64)
    to, live = sums + row * 4 * M + n, n < M
    tl.store(to, vr, mask=live)
    tl.store(to + M, vi, mask=live)
    tl.store(to + 2 * M, tr, mask=live)
    tl.store(to + 3 * M, ti, mask=live)


@triton.jit
def _found(sums, row, n, M, which):
    """A complex sum of a row: 0 its weights' gradient, 2 that of the squares."""
    at = sums + (row * 4 + which) * M + n
    return tl.load(at, mask=n < M, other=0.0), tl.load(at + M, mask=n < M, other=0.0)


@triton.jit
def _chain_kernel(
    grad, sums, a, b, p, c, dt, da, db, dp, dc, ddt, H, M, C, length, BLOCK: tl.constexpr
):  # fmt: skip
    """From the sums to the parameters' gradients, in float64."""
    h = tl.program_id(0).to(tl.int64)
    step, R, columns = tl.load(dt + h).to(tl.float64), 2 + 2 * C, length // 2 + 1
    total = tl.zeros((BLOCK,), tl.float64)
    for n0 in range(0, M, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        ar, ai = pair(a, h, n, M)
        br, bi = pair(b, h, n, M)
        pr, pi = pair(p, h, n, M)
        pp, _ = _found(sums, h * R, n, M, 0)
        xr, xi = _found(sums, h * R + 1, n, M, 0)
        tr, ti = _found(sums, h * R, n, M, 2)
        size = pr * pr + pi * pi
        wr, wi = step * size * tr, step * size * ti
        tr, ti = _found(sums, h * R + 1, n, M, 2)
        vr, vi = step * (br * pr + bi * pi), step * (bi * pr - br * pi)
        wr, wi = wr + vr * tr + vi * ti, wi + vr * ti - vi * tr
        dbr, dbi = pr * xr - pi * xi, pr * xi + pi * xr
        dpr, dpi = br * xr + bi * xi + 2.0 * pr * pp, bi * xr - br * xi + 2.0 * pi * pp
        total += pp * size + (vr * xr + vi * xi) / step
        for k in range(C):
            row = h + k * H
            cr, ci = pair(c, row, n, M)
            gr, gi = _found(sums, h * R + 2 + 2 * k, n, M, 0)
            gr += tl.where(length % 2 == 0, tl.load(grad + (row * columns + columns - 1) * 2).to(tl.float64), 0.0)
            sr, si = _found(sums, h * R + 3 + 2 * k, n, M, 0)
            dcr, dci = br * gr + bi * gi + pr * sr + pi * si, br * gi - bi * gr + pr * si - pi * sr
            dbr, dbi = dbr + cr * gr + ci * gi, dbi + cr * gi - ci * gr
            dpr, dpi = dpr + cr * sr + ci * si, dpi + cr * si - ci * sr
            total += cr * dcr + ci * dci
            keep_pair(dc, row, n, M, step * dcr, step * dci)
            tr, ti = _found(sums, h * R + 2 + 2 * k, n, M, 2)
            vr, vi = step * (br * cr - bi * ci), step * (br * ci + bi * cr)
            wr, wi = wr + vr * tr + vi * ti, wi + vr * ti - vi * tr
            tr, ti = _found(sums, h * R + 3 + 2 * k, n, M, 2)
            vr, vi = step * (pr * cr - pi * ci), step * (pr * ci + pi * cr)
            wr, wi = wr + vr * tr + vi * ti, wi + vr * ti - vi * tr
        total += ar * wr + ai * wi
        keep_pair(da, h, n, M, step * wr, step * wi)
        keep_pair(db, h, n, M, step * dbr, step * dbi)
        keep_pair(dp, h, n, M, step * dpr, step * dpi)
    tl.store(ddt + h, rounded(tl.sum(total, 0), ddt))


def _refused(c: Any, length: int) -> str | None:
    if str(c.dtype).endswith("float64"):
        return "a float64 c is served by the reference; the kernels accumulate in float32"
    return "the kernels count nodes in 32 bits" if length >= 2**31 - NODES else None


def supports_s4_spectrum(a: Any, b: Any, p: Any, c: Any, dt: Any, length: int) -> str | None:
    """The reason this kernel cannot serve a call, or None."""
    return _refused(c, length)


def supports_s4_spectrum_backward(grad: Any, a: Any, b: Any, p: Any, c: Any, dt: Any, length: int) -> str | None:
    """The same for the gradient."""
    return _refused(c, length)


def launch_s4_spectrum(a: Any, b: Any, p: Any, c: Any, dt: Any, length: int) -> Any:
    """Arguments of `s4_spectrum` -> ``[C, H, length // 2 + 1, 2]``."""
    channels, features, states, _ = c.shape
    columns = length // 2 + 1
    out = c.new_empty((channels, features, columns, 2), dtype=dtype(c, "float32"))
    launch(
        _forward_kernel, channels * features * cdiv(columns, NODES), c, a, b, p, c, dt, out, features, states, length,
        NODES=NODES, POLES=POLES,
    )  # fmt: skip
    return out


def launch_s4_spectrum_backward(
    grad: Any, a: Any, b: Any, p: Any, c: Any, dt: Any, length: int
) -> tuple[Any, Any, Any, Any, Any]:
    """Arguments of `s4_spectrum_backward` -> (da, db, dp, dc, ddt)."""
    channels, features, states, _ = c.shape
    nodes, many, poles = (length + 1) // 2, 2 + 2 * channels, cdiv(states, POLES)
    rows = c.new_empty((features, many, 2, nodes), dtype=dtype(c, "float32"))
    launch(
        _nodes_kernel, features * cdiv(nodes, NODES), c, grad, a, b, p, c, dt, rows, features, states, channels, length,
        NODES=NODES, POLES=POLES,
    )  # fmt: skip
    sums = c.new_empty((features, many, 4, states), dtype=dtype(c, "float64"))
    launch(
        _poles_kernel, features * many * poles, c, rows, a, dt, sums, features, states, many, length, poles,
        NODES=NODES, POLES=POLES,
    )  # fmt: skip
    made = tuple(t.new_empty(t.shape) for t in (a, b, p, c, dt))
    launch(_chain_kernel, features, c, grad, sums, a, b, p, c, dt, *made, features, states, channels, length, BLOCK=32)
    return made


def aot_cases() -> list[AotCase]:
    """A layer of 64 states in float32; two kernels of a feature in bfloat16, of an odd length."""

    def run(kind: str, channels: int, length: int) -> None:
        pole = Meta((256, 32, 2), "float64")
        c, dt = Meta((channels, 256, 32, 2), kind), Meta((256,), "float64")
        launch_s4_spectrum(pole, pole, pole, c, dt, length)
        grad = Meta((channels, 256, length // 2 + 1, 2), "float32")
        launch_s4_spectrum_backward(grad, pole, pole, pole, c, dt, length)

    return [
        AotCase("fp32-L4096", lambda: run("float32", 1, 4096)),
        AotCase("bf16-L1001", lambda: run("bfloat16", 2, 1001)),
    ]
