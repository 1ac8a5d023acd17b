"""Fast certified training with a short warm-up (arXiv 2103.17268): initialisation, batch-norm and two regularisers.

Weights start as N(0, 2 pi / n^2), n the fan-in, so that the radius of a box neither grows nor shrinks from layer to
layer; batch-norm follows every layer but the last; while eps rises, ``lambda (L_tight + L_relu)`` of
`w2s_fast.fast_reg` is added to the cross-entropy of the worst-case margins, lambda = 0.5 (1 - eps / eps_max).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import IntervalModule, bound
from ...ops.interval_bounds.fast_reg import fast_reg
from .._common.loop import Recipe, Trained
from .ibp import PIXELS, Clip, Stage, smoothed, train_by

FLOOR = 1e-6  # of the radius, for the regularisers before the ramp


def initialise(model: nn.Module, seed: int = 0) -> None:
    """N(0, 2 pi / n^2) for every weight but the last layer's (the halving after a residual sum has no place here)."""
    draw = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers[:-1]:
        spread = math.sqrt(2 * math.pi) / layer.weight[0].numel()
        with torch.no_grad():
            layer.weight.copy_(spread * torch.randn(layer.weight.shape, generator=draw))


def robust_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage, *, clip: Clip = PIXELS) -> Tensor:
    """Cross-entropy of the worst-case margins, of the logits while eps is 0: kappa is 0 here."""
    found = module.propagate(x, stage.eps, clip=clip, clean=True)
    return F.cross_entropy(found.margins(y) if stage.eps else found.logits, y)


def fast_loss(
    module: IntervalModule, x: Tensor, y: Tensor, stage: Stage, *, weight: float = 0.5, clip: Clip = PIXELS
) -> Tensor:
    """The same, and the regularisers until the ramp ends; ``weight``: lambda where it begins."""
    found = module.propagate(x, max(stage.eps, FLOOR), clip=clip, clean=True)
    value = F.cross_entropy(found.margins(y) if stage.eps else found.logits, y)
    if stage.ramp:
        tight, relu = fast_reg(found.before_relu, found.input_box)
        value = value + weight * (1 - stage.share) * (tight + relu).to(value.dtype)
    return value


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, eps: float = 0.1, weight: float = 0.5, first: float = 0.02,
    last: float = 0.5, fresh: bool = True, clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Certified training of a network with batch-norm; arguments as of `ibp.train`.

    Args:
        weight: of the regularisers where the ramp begins.
        fresh: initialise the weights as the paper does; False keeps them.
    """
    if fresh:
        initialise(model, recipe.seed)

    def loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
        return fast_loss(module, x, y, stage, weight=weight, clip=clip)

    return train_by(model, data, loss, recipe, eps, first, last, ramp=smoothed, **run)


@torch.no_grad()
def growth(model: nn.Module, x: Tensor, eps: float, clip: Clip = PIXELS) -> float:
    """Mean radius of the last box before a ReLU over that of the first: 1 is what the initialisation aims at."""
    radii = [(high - low).mean().item() for low, high in bound(model).propagate(x, eps, clip=clip).before_relu]
    return radii[-1] / radii[0]
