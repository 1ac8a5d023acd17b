"""Device helpers of the dual products: boxes as centre and radius, gradients through ReLU, sound rounding."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF

#: Half a unit in the last place of float32.
UNIT = tl.constexpr(2.0**-24)
SMALLEST = tl.constexpr(2.0**-126)
TINY = tl.constexpr(1e-30)


@triton.jit
def centered(a, b, BOUNDS: tl.constexpr):
    """float32 centre and radius of tiles of (lower, upper), or of (centre, radius)."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if BOUNDS:
        half = (b - a) * 0.5
        a, b = a + half, half
    return a, b


@triton.jit
def centered_sound(a, b, eta, BOUNDS: tl.constexpr):
    """Centre, and a radius that covers the box and eta |centre|; an exact 0 stays one."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if BOUNDS:
        center = a + (b - a) * 0.5
        radius = tl.maximum(b - center, center - a)
    else:
        center, radius = a, b
    grown = radius * (1.0 + 4.0 * UNIT) + tl.abs(center) * eta + SMALLEST
    return center, tl.where((center == 0.0) & (radius == 0.0), 0.0, grown)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def finished(m, r, grow, BOUNDS: tl.constexpr, RELU: tl.constexpr, SOUND: tl.constexpr):
    """Outputs of a tile from centre and radius; see csrc/cpu/interval_bounds/linear_kernel.h for the sound widening."""
    if SOUND:
        r = r * grow + (tl.abs(m) * (4.0 * UNIT) + TINY)
    x, y = m, r
    if BOUNDS:
        x, y = m - r, m + r
    if SOUND:
        known = tl.abs(m) + r < INF
        x = tl.where(known, x, -INF)
        y = tl.where(known, y, INF)
    if RELU:
        x, y = relu(x), relu(y)
    return x, y


@triton.jit
def through(ga, gb, oa, ob, BOUNDS: tl.constexpr, RELU: tl.constexpr):
    """Gradients of centre and radius before the activation from those of the outputs."""
    ga, gb = ga.to(tl.float32), gb.to(tl.float32)
    if RELU:
        ga = tl.where(oa.to(tl.float32) > 0.0, ga, 0.0)
        gb = tl.where(ob.to(tl.float32) > 0.0, gb, 0.0)
    if BOUNDS:
        ga, gb = ga + gb, gb - ga
    return ga, gb


@triton.jit
def operand(x, like, WIDE: tl.constexpr):
    """A tile as tl.dot takes it: the storage type on the matrix units, float32 where WIDE."""
    return x.to(tl.float32) if WIDE else x.to(like.dtype)


@triton.jit
def turned(w, x):
    """sign(w) x, with sign(0) = 0."""
    return tl.where(w > 0.0, x, tl.where(w < 0.0, -x, 0.0))


def eta_and_grow(terms: int) -> tuple[float, float]:
    """gamma of a chain of ``terms`` float32 terms, and the factor that makes up for it in a sum of radii."""
    eta = (terms + 2) * 2.0**-24 * 1.01
    return eta, 1.0 + 2.0 * eta + 8.0 * 2.0**-24


def narrow_outward(x: Any, like: Any, lower: bool) -> Any:
    """float32 ``x`` in the dtype of ``like``, rounded towards -infinity (``lower``) or +infinity."""
    if str(like.dtype).endswith("float32"):
        return x
    y = x.to(like.dtype)
    end = y.new_full(y.shape, float("-inf") if lower else float("inf"))
    beyond = (y.float() > x) if lower else (y.float() < x)
    return y.nextafter(end).where(beyond, y)
