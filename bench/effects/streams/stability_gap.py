"""Stability gap (arXiv 2205.13452): accuracy on old tasks drops at a switch and comes back, replay or not.

Digits rotated by 0, 80 and 160 degrees, one after the other; MLP 64-256-256-10, SGD with momentum 0.9, rate 0.1, batch
64, 150 steps a task, a memory of 200 pictures a task, ``L = L_new / 2 + L_memory / 2``; every task evaluated after
every update. The regime is that of the method's text; nothing was chosen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams.stability_gap import ContinualEvaluator, random_part, train_task

from ..data import digits, mlp
from ..protocol import Claim

ANGLES, STEPS, BATCH, MEMORY = (0, 80, 160), 150, 64, 200
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


def run(memory: int, seed: int) -> dict[str, float]:
    data, model = digits(seed), mlp(64, 256, 256, 10, seed=seed)
    train = [TensorDataset(rotated(data["train"].x, angle), data["train"].y) for angle in ANGLES]
    tests = [TensorDataset(rotated(data["test"].x, angle), data["test"].y) for angle in ANGLES]
    evaluator = ContinualEvaluator(tests, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for task, part in enumerate(train):
        kept = [random_part(old, memory, seed) for old in train[:task]]
        train_task(model, optimizer, part, kept, evaluator, task=task, steps=STEPS, batch_size=BATCH,
                   seed=10 * seed + task)  # fmt: skip
    first = [accuracies[0] for accuracies in evaluator.history]
    before, found = first[STEPS - 1], evaluator.metrics.compute()
    return {
        "before the switch": before, "drop in 30 steps": before - min(first[STEPS : STEPS + 30]),
        "lost": before - first[2 * STEPS - 1], "ACC - min-ACC": found["ACC"] - found["min_ACC"], **found,
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {"replay": run(MEMORY, seed), "all old data": run(10_000, seed)}
