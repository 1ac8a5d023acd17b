"""Complex numbers as pairs of real tensors: real arithmetic is what torch.compile takes as one graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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

    def summed(self, axis: int) -> Complex:
        """The sum over an axis."""
        return Complex(self.re.sum(axis), self.im.sum(axis))

    def like(self, t: Tensor) -> Tensor:
        """``[..., 2]`` in the dtype of t."""
        return torch.stack(self, -1).to(t.dtype)


def pair(t: Tensor, dtype: torch.dtype = torch.float64) -> Complex:
    """Of ``[..., 2]``."""
    re, im = t.to(dtype).unbind(-1)
    return Complex(re, im)
