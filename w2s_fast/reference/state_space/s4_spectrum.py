"""The spectrum of a diagonal plus low-rank state space's kernel, and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .cauchy import Fractions, fractions
from .pairs import Complex, pair


class SpectrumGradients(NamedTuple):
    """Each like its argument."""

    da: Tensor
    db: Tensor
    dp: Tensor
    dc: Tensor
    ddt: Tensor


class Parameters(NamedTuple):
    """In float64: a, b, p ``[H, M]``, c ``[C, H, M]``, dt ``[H, 1]``."""

    a: Complex
    b: Complex
    p: Complex
    c: Complex
    dt: Tensor

    def weights(self) -> Complex:
        """Of the sums pp, bp, then bc and pc of each channel, ``[H, 2 + 2 C, M]``."""
        q = Complex(self.p.re[None], -self.p.im[None])
        rows = [self.p.times(q), self.b.times(q), self.b.times(self.c), self.p.times(self.c)]
        return Complex(*(torch.cat([row[i] for row in rows]).movedim(0, -2) for i in (0, 1))).scaled(self.dt[..., None])

    def split(self, sums: Complex) -> list[Complex]:
        """Rows as pp and bp ``[1, H, ...]``, bc and pc ``[C, H, ...]``."""
        many = len(self.c.re)
        halves = (part.movedim(-2, 0).split([1, 1, many, many]) for part in sums)
        return [Complex(re, im) for re, im in zip(*halves, strict=True)]


def _given(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor) -> Parameters:
    return Parameters(pair(a), pair(b), pair(p), pair(c), dt.double()[:, None])


def _tables(made: Parameters, length: int, acc: torch.dtype) -> tuple[Tensor, Fractions, Fractions]:
    """``y / 2`` at the nodes ``i y = 2 i tan(pi l / length)``, and the fractions there."""
    turn = torch.arange((length + 1) // 2, device=made.dt.device, dtype=torch.float64) * (math.pi / length)
    y = 2 * turn.tan()
    return (y / 2).to(acc), *fractions(Complex(y.new_zeros(1), y), made.a.scaled(made.dt), acc)


def s4_spectrum(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """``[C, H, length // 2 + 1, 2]`` of complex a, b, p ``[H, M, 2]`` and c ``[C, H, M, 2]``, and dt ``[H]``.

    With sums r at the nodes z of the weights ``dt b c``, ``dt b conj(p)``, ``dt p c`` and ``dt |p|^2``: ``(r_bc - r_bp
    r_pc / (1 + r_pp)) (1 + z / 2)``; at the last node of an even length, where z has no value, its limit ``sum_n Re dt
    b_n c_n``. Sums in float32, float64 if c is; weights, poles and distances to them in float64.
    """
    acc, made = accumulate_dtype(c), _given(a, b, p, c, dt)
    half, once, _ = _tables(made, length, acc)
    weights = made.weights()
    pp, bp, bc, pc = made.split(once.rows(weights.to(acc)))
    k = bc.minus(bp.times(pc).over(Complex(1 + pp.re, pp.im)))
    found = torch.stack((k.re - half * k.im, k.im + half * k.re), -1)
    if length % 2:
        return found
    last = made.split(weights)[2].re.sum(-1).to(acc)
    return torch.cat((found, torch.stack((last, torch.zeros_like(last)), -1)[..., None, :]), -2)


def s4_spectrum_backward(
    grad: Tensor, a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int
) -> SpectrumGradients:
    """Of grad ``[C, H, length // 2 + 1, 2]``, in the same arithmetic.

    With ``G = (1 - z / 2) g`` and ``t = 1 / (1 + r_pp)``, the gradients of the sums are G for bc, ``-conj(r_bp t) G``
    for pc, ``-conj(r_pc t) G`` for bp and ``conj(r_bp r_pc t^2) G`` for pp.
    """
    acc, made = accumulate_dtype(c), _given(a, b, p, c, dt)
    half, once, square = _tables(made, length, acc)
    weights = made.weights()
    pp, bp, _, pc = made.split(once.rows(weights.to(acc)))
    g = pair(grad[..., : half.shape[0], :], acc)
    g = Complex(g.re + half * g.im, g.im - half * g.re)
    one = Complex(1 + pp.re, pp.im)
    bp, pc = bp.over(one).conj, pc.over(one).conj
    through = bp.times(g).scaled(-1.0)
    rows = [pc.times(through).scaled(-1.0), pc.times(g).scaled(-1.0)]
    parts = [Complex(row.re.sum(0, keepdim=True), row.im.sum(0, keepdim=True)) for row in rows] + [g, through]
    whole = Complex(*(torch.cat([part[i] for part in parts]).movedim(0, -2) for i in (0, 1)))
    dv = once.adjoint(whole).to(torch.float64)
    dw = weights.conj.times(square.adjoint(whole).to(torch.float64)).summed(-2)
    pp, bp, bc, pc = made.split(dv)
    if length % 2 == 0:
        bc = Complex(bc.re + grad[..., -1:, 0].double(), bc.im)
    scale, pp_re = made.dt, pp.re[0]
    dc = made.b.conj.times(bc).plus(made.p.conj.times(pc))
    own, other = Complex(bp.re[0], bp.im[0]), made.c.conj
    db = made.p.times(own).plus(other.times(bc).summed(0))
    dp = made.b.times(own.conj).plus(other.times(pc).summed(0)).plus(made.p.scaled(2 * pp_re))
    step = made.a.conj.times(dw).re + (made.b.conj.times(made.p)).times(own).re
    step = step + pp_re * (made.p.re.square() + made.p.im.square()) + other.times(dc).re.sum(0)
    return SpectrumGradients(
        dw.scaled(scale).like(a), db.scaled(scale).like(b), dp.scaled(scale).like(p), dc.scaled(scale).like(c),
        step.sum(-1).to(dt.dtype),
    )  # fmt: skip
