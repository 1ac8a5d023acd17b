"""Delayed shrinking (arXiv 2407.06167): an MLP for digits from which sub-networks of any widths are taken.

MLP 64-W-W-W-10, ReLU, W from {8, 16, 32, 64} a layer, sub-networks are the leading channels. SGD with Nesterov 0.9,
decay 3e-5, batch 64, cosine. Every arm has the matmul work of 700 steps of the largest network. Arms: sub-networks join
at 0.53 of the steps with a ramp of 0.03; they are there from the first step; the largest network alone. Each arm's rate
is chosen on dev by the mean over sub-networks.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.growth.delayed_shrinking import Subnet, sort_channels, train

from ..data import accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

BUDGET, CHOICES, RATES = 700, (8, 16, 32, 64), (0.05, 0.1, 0.2)
SHOWN = ((16, 16, 16), (32, 32, 32), (16, 32, 8), (32, 16, 64))
ARMS = {"delayed": (0.53, 0.03), "immediate": (0.0, 0.0), "alone": (1.0, 0.0)}
CLAIMS = [
    Claim("the smallest sub-network: 80 % right", "smallest", "delayed", 0.8),
    Claim("the largest: at most 1 point below training it alone", "largest", "delayed", "alone", -0.01),
    Claim("the smallest: above sub-networks from the first step", "smallest", "delayed", "immediate"),
    Claim("mean of four sub-networks: above sub-networks from the first step", "between", "delayed", "immediate"),
]


def network(widths: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    made = mlp(64, *widths, 10, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in made[::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return made


def cost(widths: tuple[int, ...]) -> float:
    """Matmul work of a step, of the largest network's."""

    def weights(a: int, b: int, c: int) -> int:
        return 64 * a + a * b + b * c + c * 10

    return weights(*widths) / weights(64, 64, 64)


SMALLER = sorted(set(product(CHOICES, repeat=3)) - {(64, 64, 64)}, key=cost)
TOGETHER = 1 + cost(SMALLER[0]) + 2 * sum(map(cost, SMALLER[1:])) / len(SMALLER[1:])


def sort(net: nn.Module) -> None:
    """All three hidden layers' channels."""
    layers: Any = net
    for i in (0, 2, 4):
        sort_channels([layers[i]], layers[i + 2])


def sgd(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, 0.9, nesterov=True, weight_decay=3e-5)


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    delay, ramp = ARMS[arm]
    share = delay - ramp  # of the steps, without sub-networks
    steps = round(BUDGET / (share + (1 - share) * TOGETHER))
    parts, model = digits(seed), network((64, 64, 64), seed)
    smaller = [network(widths) for widths in SMALLER]
    recipe = Recipe(steps, rate, batch=64, clip=None, seed=seed, optimizer=sgd)
    train(model, TensorDataset(*parts["train"]), recipe=recipe, smaller=smaller, delay=delay, ramp=ramp, sort=sort)
    between = [accuracy(Subnet(model, network(widths)), parts[on]) for widths in SHOWN]
    return {"largest": accuracy(model, parts[on]), "between": sum(between) / len(between),
            "smallest": accuracy(Subnet(model, smaller[0]), parts[on])}  # fmt: skip


def choices() -> dict[str, Choice]:
    def score(arm: str, metric: str, rate: float, seed: int, on: str) -> float:
        return run(arm, rate, seed, on)[metric]

    return {arm: choose(partial(score, arm, "largest" if arm == "alone" else "between"), {"rate": RATES})
            for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
