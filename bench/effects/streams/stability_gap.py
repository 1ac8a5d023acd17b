"""Stability gap (arXiv 2205.13452): accuracy on old tasks drops at a switch and comes back, replay or not.

Digits rotated by 0, 80 and 160 degrees, one after the other; MLP 64-256-256-10, SGD with momentum 0.9, batch 64, 150
steps a task, a memory of 200 pictures a task, ``L = L_new / 2 + L_memory / 2``; every task evaluated after every
update. The regime is that of the method's text; the rate, there 0.1, is chosen on dev for each arm by the accuracy on
all tasks at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams.stability_gap import ContinualEvaluator, random_part, train_task

from ..data import digits, mlp
from ..protocol import Choice, Claim, choose

ANGLES, STEPS, BATCH = (0, 80, 160), 150, 64
ARMS = {"replay": 200, "all old data": 10_000}  # pictures of a task in memory
RATES = (0.01, 0.03, 0.1, 0.3)
FULL = {"RATES": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
CLAIMS = [
    Claim("replay: task 0 falls by 12 points within 30 steps of the switch", "drop in 30 steps", "replay", 0.0, 0.12),
    Claim("replay: task 0 comes back to within 6 points at the end of task 1", "lost", "replay", 0.0, -0.06, "lower"),
    Claim("replay: ACC - min-ACC is at least 12 points", "ACC - min-ACC", "replay", 0.0, 0.12),
    Claim("replay: windowed forgetting WF10 is at least 10 points", "WF10", "replay", 0.0, 0.10),
    Claim("joint training on all old data falls too, by 5 points", "drop in 30 steps", "all old data", 0.0, 0.05),
]


def rotated(x: Tensor, angle: float) -> Tensor:
    """Pictures turned about their centre."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
    grid = torch.nn.functional.affine_grid(turn, [len(x), 1, 8, 8], align_corners=False)
    return torch.nn.functional.grid_sample(x.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def run(memory: int, rate: float, seed: int, on: str) -> dict[str, float]:
    """On dev, where the end alone counts, evaluated at the end of each task."""
    data, model = digits(seed), mlp(64, 256, 256, 10, seed=seed)
    train = [TensorDataset(rotated(data["train"].x, angle), data["train"].y) for angle in ANGLES]
    tests = [TensorDataset(rotated(data[on].x, angle), data[on].y) for angle in ANGLES]
    evaluator = ContinualEvaluator(tests, seed=seed, period=STEPS if on == "dev" else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for task, part in enumerate(train):
        kept = [random_part(old, memory, seed) for old in train[:task]]
        train_task(model, optimizer, part, kept, evaluator, task=task, steps=STEPS, batch_size=BATCH,
                   seed=10 * seed + task)  # fmt: skip
    found = evaluator.metrics.compute()
    if on == "dev":
        return found
    first = [accuracies[0] for accuracies in evaluator.history]
    before = first[STEPS - 1]
    return {
        "before the switch": before, "drop in 30 steps": before - min(first[STEPS : STEPS + 30]),
        "lost": before - first[2 * STEPS - 1], "ACC - min-ACC": found["ACC"] - found["min_ACC"], **found,
    }  # fmt: skip


def choices() -> dict[str, Choice]:
    def dev(memory: int) -> Choice:
        return choose(lambda rate, seed, on: run(memory, rate, seed, on)["ACC"], {"rate": RATES})

    return {arm: dev(memory) for arm, memory in ARMS.items()}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(memory, chosen[arm]["rate"], seed, "test") for arm, memory in ARMS.items()}
