"""AutoPGD (arXiv 2003.01690): steps that halve where the loss stops rising, momentum, the best point kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ball import Box, Sphere, per_sample
from .base import Attack

MOMENTUM, RISES = 0.75, 0.75  # of the step; the share of a window's steps that must raise the loss


def windows(steps: int) -> list[int]:
    """Steps after which progress is looked at: windows of 22 % of the steps, then 3 % shorter each, never below 6 %."""
    size, least, less = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found, at = [], size
    while at <= steps:
        found.append(at)
        size = max(size - less, least)
        at += size
    return found


class AutoPGD(Attack):
    """PGD without a step size: the first is ``2 eps``.

    ``z = P(x_k + eta d(g))``, ``x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))``. After every window of steps
    eta is halved, and the attack goes on from the best point so far, for samples whose loss rose in at most 75 % of
    the steps, or whose best loss and eta have not changed over the window. The point returned has the largest loss of
    all, of those that fool the model where there are some.

    Args: as of `Attack`; starts are uniform in the ball.
    """

    def attempt(self, ball: Box | Sphere, y: Any) -> Tensor:
        """One restart from the ball's centre."""
        x = ball.random(self.generator)
        g, value, out = self.gradient(x, y)
        state = {
            "x": x, "old": x, "g": g, "value": value, "best": x, "best_g": g, "best_value": value, "found": x,
            "found_value": value, "fooled": self.fooled(out, y), "rate": torch.full_like(value, 2.0),
            "rises": torch.zeros_like(value), "checked": value, "halved": torch.ones_like(value, dtype=torch.bool),
        }  # fmt: skip
        looks, since = windows(self.steps), 0
        result, rows = (x.clone(), torch.arange(len(x), device=x.device)) if self.early_stop else (x, None)
        for step in range(1, self.steps + 1):
            if rows is not None:
                gone = state["fooled"]
                if gone.any():
                    result[rows[gone]] = state["found"][gone]
                    keep = (~gone).nonzero().squeeze(1)
                    rows, y, ball = rows[keep], y[keep], ball.at(keep)
                    state = {name: part[keep] for name, part in state.items()}
                    if not len(rows):
                        return result
            self._step(state, ball, y, first=step == 1)
            if step in looks:
                self._look(state, step - since)
                since = step
        if rows is None:
            return state["found"]
        result[rows] = state["found"]
        return result

    def _step(self, s: dict[str, Tensor], ball: Box | Sphere, y: Any, *, first: bool) -> None:
        x, weight = s["x"], 1.0 if first else MOMENTUM
        z = ball.project(x + per_sample(s["rate"], x).to(x.dtype) * ball.eps * ball.direction(s["g"]))
        new = z if first else ball.project(x + weight * (z - x) + (1 - weight) * (x - s["old"]))
        g, value, out = self.gradient(new, y)
        fooled = self.fooled(out, y)
        s["rises"] += value > s["value"]
        s.update(x=new, old=x, g=g, value=value)
        better = value > s["best_value"]
        self._take(s, better, best=new, best_g=g, best_value=value)
        kept = (fooled & ~s["fooled"]) | ((fooled == s["fooled"]) & (value > s["found_value"]))
        self._take(s, kept, found=new, found_value=value)
        s["fooled"] = s["fooled"] | fooled

    def _look(self, s: dict[str, Tensor], steps: int) -> None:
        """Halve where the loss stands still, and go back to the best point there."""
        still = (s["checked"] >= s["best_value"]) & ~s["halved"]
        halve = (s["rises"] <= RISES * steps) | still
        s["rate"] = torch.where(halve, s["rate"] / 2, s["rate"])
        self._take(s, halve, x=s["best"], g=s["best_g"])
        s.update(rises=torch.zeros_like(s["rises"]), checked=s["best_value"], halved=halve)

    def _take(self, s: dict[str, Tensor], where: Tensor, **new: Tensor) -> None:
        for name, value in new.items():
            s[name] = torch.where(per_sample(where, value) if value.ndim > where.ndim else where, value, s[name])
