"""tpSGD (arXiv 2208.08503): digits, one to three hidden layers of 256 tanh units, no gradient from layer to layer.

All layers in the same sweep, batch 32. Arms: local targets with the l2 and the l1 rule, plain SGD through all layers,
and random hidden layers with a trained output. Each arm's rate is chosen on dev at three hidden layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from w2s_fast.methods.layerwise.tpsgd import TpSgd

from ..data import accuracy, digits
from ..protocol import Choice, Claim, choose

WIDTH, BATCH, EPOCHS = 256, 32, 30
RATES = (0.005, 0.02, 0.05, 0.2)
DEPTHS = (1, 2, 3)
ARMS = ("l2", "l1", "backprop", "random")
CLAIMS = [
    *(Claim(f"{d} hidden layer{'s' * (d > 1)}: at most 2 points below backprop", f"depth {d}", "l2", "backprop", -0.02)
      for d in DEPTHS),
    Claim("3 hidden layers: better than random ones by 1.5 points", "depth 3", "l2", "random", 0.015),
]  # fmt: skip


def network(depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(WIDTH if i else 64, WIDTH)
        nn.init.xavier_uniform_(linear.weight)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def run(arm: str, depth: int, rate: float, seed: int, on: str) -> float:
    data, model, draw = digits(seed), network(depth, seed), torch.Generator().manual_seed(seed)
    x, y = data["train"]
    local = TpSgd(model, rate=rate, rule="l1" if arm == "l1" else "l2", seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=draw).split(BATCH):
            if arm != "backprop":
                local.step(x[rows], y[rows], only=len(model) - 1 if arm == "random" else None)
                continue
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return accuracy(model, data[on])


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, 3, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: {f"depth {d}": run(arm, d, chosen[arm]["rate"], seed, "test") for d in DEPTHS} for arm in ARMS}
