"""Curricula in federated learning (arXiv 2212.12712): easy samples first on clients that differ much or little.

Digits on 20 clients with a Dirichlet(beta) split of the labels, 5 a round, 40 rounds of 5 local epochs, batch 16, SGD,
MLP 64-64-10; 30 % of the training samples are hard (pixel noise 0.6, half of them with a random label). Mean test
accuracy of the last 10 rounds. The regime is that of the method's text; the rate, there 0.1, is chosen on dev for each
arm at each beta.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from w2s_fast.methods.streams.federated_curriculum import simulate

from ..data import accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

CLIENTS, PER_ROUND, ROUNDS, EPOCHS, BATCH = 20, 5, 40, 5, 16
RATES = (0.03, 0.1, 0.3)
FULL = {"RATES": (0.01, 0.03, 0.1, 0.3, 1.0)}
BETAS = {"beta 0.05": 0.05, "beta 100": 100.0}
ARMS: dict[str, Any] = {"plain": None, "random order": "random", "curriculum": "easy", "anti": "hard"}
CLAIMS = [
    Claim("beta 0.05: the curriculum beats a random order by 1 point", "beta 0.05", "curriculum", "random order", 0.01),
    Claim("beta 0.05: it beats the anti-curriculum by 3 points", "beta 0.05", "curriculum", "anti", 0.03),
    Claim("its gain over a random order is 2 points larger at beta 0.05 than at 100", "gain", "curriculum",
          "random order", 0.02),
]  # fmt: skip


def clients(y: Tensor, beta: float, seed: int) -> list[list[int]]:
    """Indices of every client; every one has at least one."""
    draw = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(CLIENTS)]
    for label in range(10):
        own = draw.permutation(np.flatnonzero(y.numpy() == label))
        edges = (np.cumsum(draw.dirichlet([beta] * CLIENTS)) * len(own)).astype(int)[:-1]
        for part, more in zip(parts, np.split(own, edges), strict=True):
            part += more.tolist()
    for part in parts:
        while not part:  # a client without samples gets one of the largest client's
            part.append(max(parts, key=len).pop())
    return parts


def run(order: Any, beta: float, seed: int, on: str, rate: float) -> float:
    data, model = digits(seed), mlp(64, 64, 10, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    x, y = (t.clone() for t in data["train"])
    hard = torch.rand(len(y), generator=draw) < 0.3
    x = torch.where(hard[:, None], x + 0.6 * torch.randn(x.shape, generator=draw), x)
    wrong = hard & (torch.rand(len(y), generator=draw) < 0.5)
    y = torch.where(wrong, torch.randint(10, y.shape, generator=draw), y)
    pictures = TensorDataset(x, y)
    last: list[float] = []

    def after(turn: int, trained: nn.Module) -> None:
        if turn >= ROUNDS - 10:
            last.append(accuracy(trained, data[on]))

    simulate(model, [Subset(pictures, part) for part in clients(y, beta, seed)],
             lambda parameters: torch.optim.SGD(parameters, lr=rate), rounds=ROUNDS, per_round=PER_ROUND, epochs=EPOCHS,
             batch_size=BATCH, order=order, seed=seed, after_round=after)  # fmt: skip
    return sum(last) / len(last)


def choices() -> dict[str, Choice]:
    def dev(order: Any, beta: float) -> Choice:
        return choose(lambda **setting: run(order, beta, **setting), {"rate": RATES})

    return {f"{arm}, {name}": dev(order, beta) for arm, order in ARMS.items() for name, beta in BETAS.items()}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {
        arm: {name: run(order, beta, seed, "test", **chosen[f"{arm}, {name}"]) for name, beta in BETAS.items()}
        for arm, order in ARMS.items()
    }
    for values in found.values():
        values["gain"] = values["beta 0.05"] - values["beta 100"]  # paired differences of this are gains' differences
    return found
