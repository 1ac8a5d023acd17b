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
FLUSHED = tl.constexpr(2.0**-110)
#: What rounding the factors of a product adds, relative to |m| |w|: 2 d + d^2 with d = 2^-10 (TF32 cut off) or 2^-8
#: (bfloat16 to nearest). Two bfloat16 leave d^2 / 2 of either factor out and the product of the rests, d^2, is dropped.
FACTORS = {"fp32": 0.0, "tf32": 2.0**-9 + 2.0**-20, "bf16x3+bf16": 2.0**-15 + 2.0**-20, "bf16": 2.0**-7 + 2.0**-16}


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
def bf16_nearest(x, EMULATED: tl.constexpr):
    """bfloat16 of float32, to nearest; EMULATED keeps it in float32, for the interpreter."""
    if EMULATED:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def bf16_up(x, EMULATED: tl.constexpr):
    """bfloat16 of float32 x >= 0, rounded up."""
    bits = x.to(tl.int32, bitcast=True)
    up = tl.where(x < INF, ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True), x)
    return up if EMULATED else up.to(tl.bfloat16)


@triton.jit
def dot(x, y, acc, like, MODE: tl.constexpr, EMULATED: tl.constexpr):
    """acc + x y; the factors as MODE says: "storage" (the 16-bit type of ``like``) or a value of ``compute``."""
    if MODE == "storage":
        return tl.dot(x.to(like.dtype), y.to(like.dtype), acc)
    x, y = x.to(tl.float32), y.to(tl.float32)
    if MODE == "fp32":
        return tl.dot(x, y, acc, input_precision="ieee")
    elif MODE == "tf32":
        if EMULATED:  # cut off, the worse of the two things that hardware may do
            x = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            y = (y.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            return tl.dot(x, y, acc, input_precision="ieee")
        else:
            return tl.dot(x, y, acc, input_precision="tf32")
    else:
        head_x, head_y = bf16_nearest(x, EMULATED), bf16_nearest(y, EMULATED)
        if MODE == "bf16x3+bf16":
            rest_x = bf16_nearest(x - head_x.to(tl.float32), EMULATED)
            rest_y = bf16_nearest(y - head_y.to(tl.float32), EMULATED)
            acc = tl.dot(rest_x, head_y, tl.dot(head_x, rest_y, acc))
        return tl.dot(head_x, head_y, acc)


@triton.jit
def radius_dot(q, w, acc, like, MODE: tl.constexpr, EMULATED: tl.constexpr, SOUND: tl.constexpr):
    """acc + q |w| with factors that are never rounded down where they become bfloat16."""
    if MODE == "storage" or MODE == "fp32":
        return dot(q, tl.abs(w), acc, like, MODE, EMULATED)
    w = tl.abs(w.to(tl.float32))
    if SOUND:  # a matrix unit may take a denormal part of w for 0; eta >= 2^-15 times this is more
        w = tl.where(w == 0.0, 0.0, w + FLUSHED)
    if MODE == "tf32":
        return dot(q, w, acc, like, MODE, EMULATED)
    return tl.dot(bf16_up(q, EMULATED), bf16_up(w, EMULATED), acc)


@triton.jit
def turned(w, x):
    """sign(w) x, with sign(0) = 0."""
    return tl.where(w > 0.0, x, tl.where(w < 0.0, -x, 0.0))


def eta_and_grow(terms: int, compute: str = "fp32") -> tuple[float, float]:
    """How far a product of ``terms`` terms may be from m W^T, over |m| |W|^T, and what makes up for that of the radii.

    float32 sums round with unit 2^-24, sums in a matrix unit (which may cut off) are taken at 2^-22.
    """
    unit = 2.0**-24 if compute == "fp32" else 2.0**-22
    gamma = ((3 * terms if compute == "bf16x3+bf16" else terms) + 2) * unit * 1.01
    grow = 1.0 + 2.0 * gamma + 8.0 * 2.0**-24
    return gamma + FACTORS[compute], grow * (1.0 + 2.0**-8) if compute == "tf32" else grow


def spread_box(a: Any, b: Any, bounds: bool, spread: float) -> tuple[Any, Any]:
    """The box, float32, grown by ``spread |x|``, rounded outward (2^-22 |x| is more than both sums round)."""
    a, b, share = a.float(), b.float(), spread * (1 + 2.0**-20) + 2.0**-22
    if not bounds:
        return a, b + (a.abs() + b) * share
    grown = a.abs().maximum(b.abs()) * share
    return a - grown, b + grown


def spread_ends(x: Any, y: Any, bias: Any, spread: float, relu: bool) -> tuple[Any, Any]:
    """float32 bounds (a last axis a channel) moved outward by ``spread |bias|``; unknown where sums may overflow."""
    if bias is not None:
        moved = bias.float().abs() * (spread * (1 + 2.0**-20))
        x, y = (x - moved) - x.abs() * 2.0**-22, (y + moved) + y.abs() * 2.0**-22
    known = (y - x) < min(spread, 1.0) * 2.0**127
    x, y = x.where(known, -float("inf")), y.where(known, float("inf"))
    return (x.clamp_min(0), y.clamp_min(0)) if relu else (x, y)


def mode(a: Any, compute: str, sound: bool) -> dict[str, Any]:
    """Compile-time options of the products: 16-bit operands as they are stored unless rounding must be sound.

    The interpreter has no bfloat16 product: float32 stands in for "storage", and the modes of ``compute`` are rounded
    by hand.
    """
    interpreted = bool(getattr(a, "device", None) is not None and a.device.type == "cpu")
    plain = sound or "float32" in str(a.dtype)
    return {"MODE": compute if plain else "fp32" if interpreted else "storage", "EMULATED": interpreted}


def narrow_outward(x: Any, like: Any, lower: bool) -> Any:
    """float32 ``x`` in the dtype of ``like``, rounded towards -infinity (``lower``) or +infinity."""
    if str(like.dtype).endswith("float32"):
        return x
    y = x.to(like.dtype)
    end = y.new_full(y.shape, float("-inf") if lower else float("inf"))
    beyond = (y.float() > x) if lower else (y.float() < x)
    return y.nextafter(end).where(beyond, y)
