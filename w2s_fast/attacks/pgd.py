"""Projected gradient descent (arXiv 1706.06083), with momentum (arXiv 1710.06081), in L-infinity or L2."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks
from .ball import OP, Box, Sphere, unit
from .base import Attack, Model

Start = Literal["uniform", "gauss", "none"]
STARTS = ("uniform", "gauss", "none")
GAUSS = 1e-3


class PGD(Attack):
    """``z <- project(z + alpha d(g))`` with d the sign (L-infinity) or ``g / ||g||`` (L2), g the gradient of the loss.

    With momentum mu, ``m <- mu m + g / ||g||_1`` takes the place of g (``g / mean |g|`` is the same step). The last
    point is returned, without a look at whether it is the worst; with restarts the worst of the last points.

    Args:
        model, eps, **attack: as of `Attack`.
        alpha: length of a step, a number or, for "linf", a tensor as eps; default ``2.5 eps / steps``.
        momentum: mu; 0 for none.
        start: "uniform" in the ball, "gauss" (standard deviation 0.001), or "none": at x.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, model: Model, eps: float | Tensor, *, alpha: float | Tensor | None = None, momentum: float = 0.0,
        start: Start = "uniform", **attack: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, eps, **attack)
        if alpha is not None and not isinstance(alpha, Tensor):
            checks.number(OP, "alpha", alpha, low=0.0)
        self.alpha = 2.5 / self.steps * eps if alpha is None else alpha
        self.momentum = checks.number(OP, "momentum", momentum, low=0.0)
        self.start = checks.choice(OP, "start", start, STARTS)

    def _first(self, ball: Box | Sphere) -> Tensor:
        if self.start == "uniform":
            return ball.random(self.generator)
        if self.start == "gauss":
            home = ball.x.device if self.generator is None else self.generator.device
            noise = torch.randn(ball.x.shape, generator=self.generator, device=home)
            return ball.project(ball.x + GAUSS * noise.to(ball.x))
        return ball.x

    def attempt(self, ball: Box | Sphere, y: Any) -> Tensor:
        """One restart from the ball's centre."""
        z, mean = self._first(ball), None
        alpha = torch.as_tensor(self.alpha, dtype=z.dtype, device=z.device)
        found, rows = (z.clone(), torch.arange(len(z), device=z.device)) if self.early_stop else (z, None)
        for _ in range(self.steps):
            g, _, out = self.gradient(z, y)
            if rows is not None:
                gone = self.fooled(out, y)
                if gone.any():
                    found[rows[gone]] = z[gone]
                    keep = (~gone).nonzero().squeeze(1)
                    rows, z, y, g, ball = rows[keep], z[keep], y[keep], g[keep], ball.at(keep)
                    mean = None if mean is None else mean[keep]
                    if not len(rows):
                        return found
            if self.momentum:
                g = unit(g, self.lead, 1)
                g = mean = g if mean is None else self.momentum * mean + g
            z = ball.project(z + alpha * ball.direction(g))
        if rows is None:
            return z
        found[rows] = z
        return found
