"""Complex numbers and powers in float64, for tables of the state spaces."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(x):
    """cos and sin of 2 pi x of float64 x, by Taylor sums of a quarter of the angle."""
    a = (x - tl.floor(x + 0.5)) * 1.5707963267948966
    s = a * a
    c = s * -1.5619206968586226e-16 + 4.779477332387385e-14
    c = c * s - 1.1470745597729725e-11
    c = c * s + 2.08767569878681e-09
    c = c * s - 2.755731922398589e-07
    c = c * s + 2.48015873015873e-05
    c = c * s - 0.001388888888888889
    c = c * s + 0.041666666666666664
    c = (c * s - 0.5) * s + 1.0
    q = s * -8.22063524662433e-18 + 2.8114572543455206e-15
    q = q * s - 7.647163731819816e-13
    q = q * s + 1.6059043836821613e-10
    q = q * s - 2.505210838544172e-08
    q = q * s + 2.7557319223985893e-06
    q = q * s - 0.0001984126984126984
    q = q * s + 0.008333333333333333
    q = (q * s - 0.16666666666666666) * s * a + a
    c, q = c * c - q * q, 2.0 * c * q
    return c * c - q * q, 2.0 * c * q


@triton.jit
def power(re, im, at):
    """``e^{z at}`` of z with its imaginary part in turns."""
    size = tl.exp(re * at)
    c, s = turn(im * at)
    return size * c, size * s


@triton.jit
def pair(p, h, n, M):
    """Complex numbers n of ``[H, M, 2]`` in float64, 0 past the last."""
    at = p + (h * M + n) * 2
    return tl.load(at, mask=n < M, other=0.0).to(tl.float64), tl.load(at + 1, mask=n < M, other=0.0).to(tl.float64)


@triton.jit
def rounded(x, to):
    """float64 x in the dtype that ``to`` points at, narrow ones by way of float32."""
    if to.dtype.element_ty == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(to.dtype.element_ty)


@triton.jit
def keep_pair(to, h, n, M, re, im):
    at = to + (h * M + n) * 2
    tl.store(at, rounded(re, to), mask=n < M)
    tl.store(at + 1, rounded(im, to), mask=n < M)
