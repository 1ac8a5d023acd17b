"""Tightness of interval bounds (arXiv 2306.10426): it falls with width and depth, and IBP training raises it.

ReLU networks of width 32 or 128 and 2 to 4 layers on digits, Gaussian weights of variance 2 / fan-in. Local tightness
of the margins over test pictures before training, after plain training and after IBP training at radius 0.06 (600 steps
of 128, the same for both); and deep linear networks against the prediction. The schedule is that of earlier runs;
nothing is chosen.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from w2s_fast import tightness_rows
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.certified.ibp import ibp_loss, plain_loss, train_by
from w2s_fast.methods.certified.tightness import local_tightness, predicted

from ..data import Split, digits, mlp
from ..protocol import Claim

EPS, STEPS = 0.06, 600
FULL = {"STEPS": 2400}
CLAIMS = [
    Claim("untrained: width 32 is tighter than 128", "32 x 3", "untrained", "untrained, wider", 0.0),
    Claim("untrained: 2 layers are tighter than 4", "32 x 2", "untrained", "untrained, deeper", 0.0),
    Claim("IBP training raises the tightness above plain training's", "128 x 3", "IBP", "plain", 0.0),
    Claim("linear networks: within 15 % of the prediction", "off by", "linear", 0.15, 0.0, "lower"),
]


def network(width: int, depth: int, seed: int) -> nn.Sequential:
    """``depth`` linear layers with ReLU between them and Gaussian weights of variance 2 / fan-in."""
    model, draw = mlp(64, *(width,) * (depth - 1), 10, seed=seed), torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.in_features), generator=draw)
            nn.init.zeros_(layer.bias)
    return model


def linear_tightness(width: int, depth: int, seed: int) -> float:
    """Mean tightness of 64 outputs of a deep linear network of 64 inputs, Gaussian weights."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [64] + [width] * (depth - 1)
    weights = [torch.randn(n, k, generator=draw) / math.sqrt(k) for k, n in pairwise(sizes)]
    return tightness_rows(weights, None, torch.randn(64, width, generator=draw)).mean().item()


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    parts = digits(seed)

    def tight(model: nn.Sequential, held: Split = parts["test"]) -> float:
        return local_tightness(model, held.x, held.y, EPS)[0].mean().item()

    def trained(loss: Any) -> nn.Sequential:
        model, recipe = network(128, 3, seed), Recipe(STEPS, 2e-3, batch=128, clip=10.0, schedule="linear", seed=seed)
        train_by(model, TensorDataset(*parts["train"]), loss, recipe, EPS, 0.0, 0.6)
        return model

    off = [abs(linear_tightness(w, d, seed) / predicted(w) ** (d - 1) - 1) for w, d in ((32, 2), (128, 2), (64, 4))]
    narrow = tight(network(32, 3, seed))
    return {
        "untrained": {"32 x 3": narrow, "32 x 2": tight(network(32, 2, seed)), "128 x 3": tight(network(128, 3, seed))},
        "untrained, wider": {"32 x 3": tight(network(128, 3, seed))},
        "untrained, deeper": {"32 x 2": tight(network(32, 4, seed))},
        "plain": {"128 x 3": tight(trained(plain_loss))}, "IBP": {"128 x 3": tight(trained(ibp_loss))},
        "linear": {"off by": max(off)},
    }  # fmt: skip
