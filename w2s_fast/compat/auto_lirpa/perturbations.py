"""What is known of an input: a norm ball or a box, and a tensor that carries it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...nn.interval import Ball

OP = "compat.auto_lirpa.PerturbationLpNorm"


class PerturbationLpNorm:
    """All inputs within ``eps`` of x in the p-norm of a sample, or, with norm inf, the box ``[x_L, x_U]``.

    Args:
        eps: radius, a number or a tensor that broadcasts to x; not read where both ends of a box are given.
        norm: ``inf``, 2 or 1.
        x_L, x_U: ends of the box, tensors that broadcast to x; either may be None.
        eps_min: as auto_LiRPA has it, for a ball without a middle; only 0 is supported.
    """

    def __init__(
        self, eps: Any = 0, norm: float = math.inf, x_L: Tensor | None = None, x_U: Tensor | None = None,
        eps_min: float = 0,
    ) -> None:  # fmt: skip
        if eps_min:
            checks.fail(OP, "eps_min", "0", eps_min)
        if norm not in (1, 2, math.inf):
            checks.fail(OP, "norm", "inf, 2 or 1", norm)
        if norm != math.inf and not (x_L is None and x_U is None):
            checks.fail(OP, "x_L and x_U", "None unless norm is inf", f"norm {norm}")
        self.eps, self.norm, self.x_L, self.x_U = eps, float(norm), x_L, x_U

    def ball(self, x: Tensor) -> Ball:
        """What `w2s_fast.nn.bound` takes for x.

        Raises:
            ValueError: where x is outside its box.
        """
        if self.norm != math.inf:
            return Ball(x, self.eps, None, self.norm)
        low = x - self.eps if self.x_L is None else self.x_L.expand_as(x).to(x)
        high = x + self.eps if self.x_U is None else self.x_U.expand_as(x).to(x)
        if self.x_L is None and self.x_U is None:
            return Ball(x, self.eps)
        if not bool(((low <= x) & (x <= high)).all()):
            checks.fail(OP, "x_L and x_U", "around the input", "an input outside its box")
        # a radius that reaches both ends, cut to them
        return Ball(x, (torch.maximum(high - x, x - low) * (1 + 1e-6)).detach(), (low, high))

    def __repr__(self) -> str:
        box = "" if self.x_L is None and self.x_U is None else ", a box"
        eps = "a tensor" if isinstance(self.eps, Tensor) else self.eps
        return f"PerturbationLpNorm(norm={self.norm}, eps={eps}{box})"


class BoundedTensor(Tensor):
    """A tensor with a perturbation ``ptb``; without one it is exact."""

    ptb: PerturbationLpNorm | None

    @staticmethod
    def __new__(cls, x: Tensor, ptb: PerturbationLpNorm | None = None) -> BoundedTensor:
        made = torch.Tensor._make_subclass(cls, x.detach() if isinstance(x, Tensor) else torch.as_tensor(x))
        made.ptb = ptb
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what is computed from it is an ordinary tensor
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def to(self, *args: Any, **kwargs: Any) -> BoundedTensor:  # type: ignore[override]
        """The same perturbation on another device or in another dtype."""
        return BoundedTensor(self.as_subclass(Tensor).to(*args, **kwargs), self.ptb)


def plain(x: Any) -> Any:
    """The tensor itself."""
    return x.as_subclass(Tensor) if isinstance(x, BoundedTensor) else x
