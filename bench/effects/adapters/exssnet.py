"""ExSSNeT (arXiv 2210.10209): a subnetwork a task, whose weights are trained where no earlier task has its own.

Ten tasks of all ten digits, pixels permuted by the task; a network of 64, 128, 128 and 10 without biases, its signs
random; a task takes 2 % of every weight. 100 steps for the scores and 100 for the weights (SupSup: 200 for the scores),
batch 64. SSNeT trains all weights of the mask. The scores' rate is chosen on dev for each, on five tasks; the weights'
is 1e-2.
Percent right over the tasks in the end; *forgotten* is what they have lost since each was learned.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.adapters import exssnet

from ..data import digits
from ..protocol import Choice, Claim, choose

TASKS, DENSITY, STEPS, WEIGHT_RATE, RATES = 10, 0.02, 100, 1e-2, (1e-3, 3e-3, 1e-2)
ARMS = ("SupSup", "SSNeT", "ExSSNeT")
CLAIMS = [
    Claim("ExSSNeT beats SupSup by 4 points", "right", "ExSSNeT", "SupSup", 4.0),
    Claim("ExSSNeT beats SSNeT by 2 points", "right", "ExSSNeT", "SSNeT", 2.0),
    Claim("ExSSNeT forgets nothing", "forgotten", "ExSSNeT", 0.0, -1e-6, "lower"),
]


def run(arm: str, rate: float, seed: int, on: str, tasks: int) -> dict[str, float]:
    parts, draw = digits(seed), torch.Generator().manual_seed(1000 + seed)
    layers = [layer for i, o in pairwise((64, 128, 128, 10)) for layer in (nn.Linear(i, o, bias=False), nn.ReLU())]
    model = exssnet.Supermasks(nn.Sequential(*layers[:-1]), DENSITY, seed=seed)
    orders = [torch.arange(64), *(torch.randperm(64, generator=draw) for _ in range(tasks - 1))]

    @torch.no_grad()
    def right(task: int) -> float:
        held = parts[on]
        return 100 * (model(held.x[:, orders[task]], task).argmax(1) == held.y).double().mean().item()

    first = []
    for task, order in enumerate(orders):
        recipe = Recipe(STEPS * (2 if arm == "SupSup" else 1), rate, batch=64, seed=10 * seed + task)
        data = TensorDataset(parts["train"].x[:, order], parts["train"].y)
        exssnet.train(model, data, recipe=recipe, weight_rate=0.0 if arm == "SupSup" else WEIGHT_RATE,
                      exclusive=arm == "ExSSNeT")  # fmt: skip
        first.append(right(task))
    last = [right(task) for task in range(tasks)]
    return {"right": sum(last) / tasks, "forgotten": (sum(first) - sum(last)) / tasks}


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on, TASKS // 2)["right"], {"rate": RATES})
            for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test", TASKS) for arm in ARMS}
