"""Adversarial fine-tuning (arXiv 2012.13628): a trained model, a few epochs of PGD, a slow start, a fast decay.

``rate(t) = rate min((t + 1) / w, exp(-k max(0, t + 1 - w)))``: linear up to update w, then exponential down to ``end``
of it at the last one. The paper's constants are not public; w is half of the updates here and ``end`` 1 %.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ... import checks
from .._common.loop import Recipe, Trained
from . import adversarial_training

OP = "methods.adversarial_finetuning"


class SlowFast:
    """The schedule, for `Recipe`: ``SlowFast()(optimizer, steps)``.

    Raises:
        ValueError: naming `start`, `end`.
    """

    def __init__(self, start: float = 0.5, end: float = 0.01) -> None:
        self.start = checks.number(OP, "start", start, low=0.0, high=1.0)
        self.end = checks.number(OP, "end", end, low=0.0, high=1.0, open_low=True)

    def factor(self, step: int, steps: int) -> float:
        """Of the rate at an update."""
        warm = max(1.0, self.start * steps)
        fall = -math.log(self.end) / max(1.0, steps - warm)
        return min((step + 1) / warm, math.exp(-fall * max(0.0, step + 1 - warm)))

    def __call__(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """A scheduler of torch."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, steps))


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, eps: float = 8 / 255, attack_steps: int = 10, start: float = 0.5,
    end: float = 0.01, **how: Any,
) -> Trained:  # fmt: skip
    """Make a trained classifier robust in a few epochs; arguments as of `adversarial_training.train`.

    Args:
        start: share of the updates until the rate is at its highest.
        end: share of the rate at the last update.

    Raises:
        ValueError: naming `start`, `end`.
    """
    schedule = SlowFast(start, end)
    how.setdefault("key", [start, end, eps, attack_steps])
    return adversarial_training.train(model, data, recipe=recipe.but(schedule=schedule), eps=eps,
                                      attack_steps=attack_steps, **how)  # fmt: skip
