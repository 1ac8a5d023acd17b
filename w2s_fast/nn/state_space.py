"""Sums of poles and of powers, of which the kernels of S4 and S4D are made, in real arithmetic.

A state space with a real input has its states in conjugate pairs; one of each pair is stored, and every sum below
stands for both. Complex numbers are pairs of real tensors, so that torch.compile sees one graph. Tables are made in
float64: a phase of many turns, or the distance of a node to a pole, has no digits in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.state_space.cauchy import fractions
from ..reference.state_space.pairs import Complex


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


def cauchy_sym(v: Complex, z: Complex, w: Complex, dtype: torch.dtype | None = None) -> Complex:
    """``sum_n v_n / (z_l - w_n) + conj(v_n) / (z_l - conj(w_n))`` ``[..., R, L]``.

    The two reciprocals of a node and a pole are shared by the R rows of weights, and the sums over n are four real
    products of ``[R, M]`` by ``[M, L]``. A node on a pole gives what is not finite. There is no kernel of these sums
    alone: S4 needs four rows of them, for which `w2s_fast.s4_spectrum` takes 2.4 ms where torch.compile takes 1.8 for
    one row (9.5 for 29 ms with gradients; H 256, M 32, L 1024, two threads of an AMD EPYC, family 25 model 17).

    Args:
        v: weights ``[..., R, M]``.
        z: nodes ``[L]``; a real part ``[1]`` stands for all.
        w: poles ``[..., M]``.
        dtype: of the sums; default that of the weights. The distances of nodes to poles are taken in the dtype of z
            and w.
    """
    once, _ = fractions(z, w, v.re.dtype if dtype is None else dtype)
    return once.rows(v.to(once.sum_p.dtype))
