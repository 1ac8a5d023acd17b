"""Power-law rehearsal (arXiv 2401.10393): eight permutations of the digits' pixels, one after the other.

MLP 64-128-10, 400 pictures a task, 3 epochs, batch 32, SGD; rehearsal of half as many old samples as new ones, drawn by
a power law of age, an exponential, uniformly, or not at all. Accuracy over all eight tasks at the end. The rate is
chosen for each arm on dev.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams.power_law_rehearsal import train_tasks

from ..data import Split, accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

TASKS, PICTURES, EPOCHS, BATCH = 8, 400, 3, 32
RATES = (0.05, 0.1, 0.2)
ARMS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"}, "exponential": {"kind": "exponential"}, "uniform": {"kind": "uniform"},
    "power 0.5": {"alpha": 0.5}, "power 1": {"alpha": 1.0}, "power 2": {"alpha": 2.0},
}  # fmt: skip
CLAIMS = [
    Claim("the power law beats no rehearsal by 10 points", "mean", "power 1", "none", 0.10),
    Claim("the power law beats an exponential by 2 points", "mean", "power 1", "exponential", 0.02),
    Claim("the power law loses at most 5 points to uniform rehearsal", "mean", "power 1", "uniform", -0.05),
    Claim("the power law beats uniform rehearsal", "mean", "power 1", "uniform", 0.0),
]


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    data, model = digits(seed), mlp(64, 128, 10, seed=seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    orders = [torch.randperm(64, generator=draw) for _ in range(TASKS)]
    x, y = data["train"]
    parts = [torch.randperm(len(y), generator=draw)[:PICTURES] for _ in range(TASKS)]
    tasks = [TensorDataset(x[part][:, order], y[part]) for part, order in zip(parts, orders, strict=True)]
    train_tasks(model, tasks, torch.optim.SGD(model.parameters(), lr=rate), epochs=EPOCHS, batch_size=BATCH, seed=seed,
                **ARMS[arm])  # fmt: skip
    found = [accuracy(model, Split(data[on].x[:, order], data[on].y)) for order in orders]
    return {"mean": sum(found) / TASKS, "first task": found[0], "last task": found[-1]}


def choices() -> dict[str, Choice]:
    def dev(arm: str) -> Choice:
        return choose(lambda rate, seed, on: run(arm, rate, seed, on)["mean"], {"rate": RATES})

    return {arm: dev(arm) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
