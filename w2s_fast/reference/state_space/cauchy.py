"""Sums over poles and their conjugates, and their adjoint."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import Complex


class Fractions(NamedTuple):
    """``p - i q = 1 / (z - w)`` and ``P - i Q = 1 / (z - conj(w))`` of nodes ``[L]`` and poles ``[H, M]``, as their
    sums and differences ``[H, M, L]``: every row of weights takes these."""

    sum_p: Tensor
    less_p: Tensor
    sum_q: Tensor
    less_q: Tensor

    def rows(self, v: Complex) -> Complex:
        """``sum_n v_n / (z - w_n) + conj(v_n) / (z - conj(w_n))`` ``[H, R, L]`` of weights ``[H, R, M]``."""
        return Complex(v.re @ self.sum_p + v.im @ self.less_q, v.im @ self.less_p - v.re @ self.sum_q)

    def adjoint(self, g: Complex) -> Complex:
        """``sum_l g_l conj(1 / (z - w)) + conj(g_l) / (z - conj(w))`` ``[H, R, M]`` of ``[H, R, L]``."""
        return Complex(
            g.re @ self.sum_p.mT - g.im @ self.sum_q.mT, g.re @ self.less_q.mT + g.im @ self.less_p.mT
        )  # fmt: skip


def fractions(z: Complex, w: Complex, dtype: torch.dtype) -> tuple[Fractions, Fractions]:
    """Those, and the same of the squares; distances in float64, where a node next to a pole has digits."""
    d = (z.re - w.re[..., None]).to(dtype)
    e, f = (z.im - w.im[..., None]).to(dtype), (z.im + w.im[..., None]).to(dtype)
    one, two = d.square() + e.square(), d.square() + f.square()
    p, q, p2, q2 = d / one, e / one, d / two, f / two
    a, b = p.square() - q.square(), p2.square() - q2.square()
    once = Fractions(p + p2, p - p2, q + q2, q - q2)
    return once, Fractions(a + b, a - b, 2 * (p * q + p2 * q2), 2 * (p * q - p2 * q2))
