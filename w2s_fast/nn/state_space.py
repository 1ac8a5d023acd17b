"""Sums of poles and of powers, of which the kernels of S4 and S4D are made, in real arithmetic.

A state space with a real input has its states in conjugate pairs; one of each pair is stored, and every sum below
stands for both. Complex numbers are pairs of real tensors, so that torch.compile sees one graph. Tables are made in
float64: a phase of many turns, or the distance of a node to a pole, has no digits in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

BLOCK = 64


class Complex(NamedTuple):
    """Real and imaginary part."""

    re: Tensor
    im: Tensor

    def times(self, other: Complex) -> Complex:
        """The product."""
        return Complex(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def plus(self, other: Complex) -> Complex:
        """The sum."""
        return Complex(self.re + other.re, self.im + other.im)

    def minus(self, other: Complex) -> Complex:
        """The difference."""
        return Complex(self.re - other.re, self.im - other.im)

    def scaled(self, factor: Tensor | float) -> Complex:
        """Times a real number."""
        return Complex(self.re * factor, self.im * factor)

    def over(self, other: Complex) -> Complex:
        """The quotient."""
        size = other.re.square() + other.im.square()
        return self.times(Complex(other.re / size, -other.im / size))

    @property
    def conj(self) -> Complex:
        """The conjugate."""
        return Complex(self.re, -self.im)

    def to(self, dtype: torch.dtype) -> Complex:
        """In another dtype."""
        return Complex(self.re.to(dtype), self.im.to(dtype))


def both(a: Complex, x: Complex) -> Tensor:
    """``sum_n a_n x_n`` over the stored half and its conjugates, ``[..., 1]``."""
    return 2 * (a.re * x.re - a.im * x.im).sum(-1, keepdim=True)


def exp(z: Complex) -> Complex:
    """``e^z``."""
    size = z.re.exp()
    return Complex(size * z.im.cos(), size * z.im.sin())


def expm1_over(z: Complex, dt: Tensor) -> Complex:
    """``dt (e^z - 1) / z``, which is dt at 0; without the cancellation of ``e^z - 1`` at small z."""
    grown = z.re.exp()
    top = Complex(torch.expm1(z.re) * z.im.cos() - 2 * (z.im / 2).sin().square(), grown * z.im.sin())
    size = z.re.square() + z.im.square()
    safe = torch.where(size > 0, size, 1.0)
    found = top.times(Complex(z.re / safe, -z.im / safe))
    return Complex(torch.where(size > 0, found.re, 1.0) * dt, torch.where(size > 0, found.im, 0.0) * dt)


class Tables(NamedTuple):
    """``e^{64 x q}`` ``[..., M, Q]`` and ``e^{x r}`` ``[..., M, 64]``."""

    coarse: Complex
    fine: Complex


def tables(x: Complex, length: int, dtype: torch.dtype) -> Tables:
    """Of ``x`` ``[..., M]`` in float64, for positions below ``length``."""

    def powers(count: int, step: int) -> Complex:
        n = torch.arange(count, device=x.re.device, dtype=torch.float64) * step
        return exp(Complex(x.re[..., None] * n, x.im[..., None] * n)).to(dtype)

    count = (length + BLOCK - 1) // BLOCK + 1  # never 1, for which a traced graph would serve no other length
    return Tables(powers(count, BLOCK), powers(BLOCK, 1))


def expanded(c: Complex, made: Tables, length: int) -> Tensor:
    """``2 Re sum_n c_n e^{x_n l}`` ``[..., H, length]`` of ``c`` ``[..., H, M]``.

    With ``l = 64 q + r``, ``e^{x l} = e^{64 x q} e^{x r}``: one real product of ``[Q, 2 M]`` by ``[2 M, 64]``.
    """
    left = Complex(c.re[..., None], c.im[..., None]).times(made.coarse)
    rows = torch.cat((left.re, -left.im), -2).mT  # [..., H, Q, 2 M]
    found = 2 * rows @ torch.cat((made.fine.re, made.fine.im), -2)
    return found.flatten(-2)[..., :length]


def vandermonde_log(c: Complex, x: Complex, length: int) -> Tensor:
    """``K_l = 2 Re sum_n c_n e^{x_n l}`` ``[..., length]`` for l from 0, of ``c`` and ``x`` ``[..., M]``.

    No tensor of M times ``length`` is made, and no power is a product with l in float32.

    Args:
        c: weights; the sums are in their dtype, float32 at least.
        x: logarithms of the numbers whose powers are summed.

    Raises:
        ValueError: naming `length`.

    Example:
        >>> import torch
        >>> from w2s_fast.nn.state_space import Complex, vandermonde_log
        >>> one, half = torch.ones(1), torch.full((1,), 0.5).log()
        >>> vandermonde_log(Complex(one, 0 * one), Complex(half, 0 * one), 4)
        tensor([2.0000, 1.0000, 0.5000, 0.2500])
    """
    checks.integer("nn.state_space.vandermonde_log", "length", length, low=1)
    dtype = torch.promote_types(c.re.dtype, torch.float32)
    return expanded(c.to(dtype), tables(x.to(torch.float64), length, dtype), length)


def cauchy_sym(v: Complex, z: Complex, w: Complex, dtype: torch.dtype | None = None) -> Complex:
    """``sum_n v_n / (z_l - w_n) + conj(v_n) / (z_l - conj(w_n))`` ``[..., R, L]``.

    The two reciprocals of a node and a pole are shared by the R rows of weights, and the sums over n are four real
    products of ``[R, M]`` by ``[M, L]``. A node on a pole gives what is not finite.

    Args:
        v: weights ``[..., R, M]``.
        z: nodes ``[L]``; a real part ``[1]`` stands for all.
        w: poles ``[..., M]``.
        dtype: of the sums; default that of the weights. The distances of nodes to poles are taken in the dtype of z
            and w.
    """
    dtype = v.re.dtype if dtype is None else dtype
    a = (z.re - w.re[..., None]).to(dtype)
    one, two = (z.im - w.im[..., None]).to(dtype), (z.im + w.im[..., None]).to(dtype)
    first, second = (a.square() + d.square() for d in (one, two))
    p, q = (a / first, a / second), (one / first, two / second)
    re, im = v.re.to(dtype), v.im.to(dtype)
    return Complex(re @ (p[0] + p[1]) + im @ (q[0] - q[1]), im @ (p[0] - p[1]) - re @ (q[0] + q[1]))


def s4_spectrum(
    a: Complex, b: Complex, p: Complex, c: Complex, dt: Tensor, length: int, dtype: torch.dtype | None = None
) -> Complex:  # fmt: skip
    """Spectrum ``[C, H, length // 2 + 1]`` of the kernel of ``A = diag(a) - p p*``, for ``irfft`` (arXiv 2111.00396).

    The bilinear rule with steps dt, at the nodes ``z_l = 2 i tan(pi l / length)``: with Cauchy sums r of the weights
    ``dt b c``, ``dt b conj(p)``, ``dt p c``, ``dt p conj(p)``, the spectrum is ``(r_bc - r_bp r_pc / (1 + r_pp)) (1 +
    z / 2)``; at the last node of an even length, where z has no value, its limit ``sum_n Re dt b_n c_n``.

    Args:
        a, b, p: ``[H, M]``, float64 where the kernel is to have float32's digits.
        c: ``[C, H, M]``, the output map times ``I - Abar^length``.
        dt: ``[H]``.
        dtype: of the sums over states; default that of a.

    Raises:
        ValueError: naming `length`, which must be 2 or more.
    """
    checks.integer("nn.state_space.s4_spectrum", "length", length, low=2)
    count = (length + 1) // 2
    turn = torch.arange(count, device=dt.device, dtype=torch.float64) * (math.pi / length)
    y = 2 * turn.tan()
    step = dt[:, None]
    b, under = b.scaled(step), p.scaled(step)
    q = Complex(p.re[None], -p.im[None])
    rows = [b.times(q), under.times(q), b.times(c), under.times(c)]
    weights = Complex(*(torch.cat([row[i] for row in rows]).movedim(0, -2) for i in (0, 1)))  # [H, 2 + 2 C, M]
    zero = y.new_zeros(1)
    sums = cauchy_sym(weights, Complex(zero, y), a.scaled(step), dtype)
    each = [Complex(re, im) for re, im in zip(*(part.movedim(-2, 0).split([1, 1, len(c.re), len(c.re)])
                                                for part in sums), strict=True)]  # fmt: skip
    bp, pp, bc, pc = each
    found = bc.minus(bp.times(pc).over(Complex(1 + pp.re, pp.im)))
    found = found.times(Complex(torch.ones_like(zero), y / 2).to(found.re.dtype))
    if length % 2:
        return found
    last = rows[2].re.sum(-1, keepdim=True).to(found.re.dtype)
    return Complex(torch.cat((found.re, last), -1), torch.cat((found.im, torch.zeros_like(last)), -1))
