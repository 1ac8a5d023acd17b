"""Tightness of interval bounds (arXiv 2306.10426): how it falls with width and depth, and what IBP training does to it.

Tightness of a linear map is the radius of the best box around its image over the radius of interval bound propagation.
For deep linear networks with Gaussian weights the paper predicts it; a ReLU network has one at each input, with the
units that are active there (local tightness, of the margins).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ... import checks, tightness_rows


def predicted(width: float) -> float:
    """Expected optimal over expected layer-wise radius of two Gaussian layers with ``width`` units between them.

    ``sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2))``, about ``sqrt(pi / (2 d))``; a product of such factors, one a
    hidden layer, for more layers: the rows of a product with a Gaussian matrix are Gaussian again, given the others.
    """
    return math.sqrt(math.pi) / width * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))


@torch.no_grad()
def local_tightness(
    model: nn.Sequential, x: Tensor, y: Tensor, eps: float, clip: tuple[float, float] | None = (0.0, 1.0)
) -> tuple[Tensor, float]:
    """``[N, C - 1]`` of the margins over wrong classes; and what `predicted` says of the units active on average.

    Args:
        model: a Sequential of Linear layers and ReLUs (others that change no value, such as Flatten, may stand before).
        x, y: inputs and labels.

    Raises:
        ValueError: naming `model`.
    """
    layers = [m for m in model if isinstance(m, nn.Linear)]
    if not layers or any(not isinstance(m, (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity)) for m in model):
        checks.fail("methods.tightness", "model", "a Sequential of Linear and ReLU", type(model).__name__)
    *hidden, last = layers
    patterns: list[Tensor] = []
    x = x.flatten(1)
    h, expected = x, 1.0
    for layer in hidden:
        h = layer(h).relu()
        patterns.append(h > 0)
        expected *= predicted(patterns[-1].sum(1).float().mean().item())
    classes = torch.arange(len(last.weight), device=y.device).expand(len(y), -1)
    wrong = classes[classes != y[:, None]].view(len(y), -1)
    rows = last.weight[wrong] - last.weight[y][:, None]
    low, high = clip or (-math.inf, math.inf)
    radius = ((x + eps).clamp_max(high) - (x - eps).clamp_min(low)) / 2
    return tightness_rows([m.weight for m in hidden], patterns, rows, radius), expected
