"""Weak-to-strong generalization (arXiv 2312.09390): how much of the gap the confidence loss recovers.

Two tasks on real data, see `supervised`: is a piece of 16 tokens code or documentation, and which digit is this? The
weak model is linear and sees four tokens, or half of the picture. Performance gap recovered (0: the weak supervisor, 1:
the strong model trained on the ground truth) on the test part. The rate is chosen for each loss on dev accuracy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.classify import predicted
from w2s_fast.methods.supervision import weak_to_strong
from w2s_fast.methods.supervision.weak_to_strong import Loss

from ..protocol import Choice, Claim, choose
from ..supervised import TASKS, Classifier, accuracy, scores, weak_model

ARMS = {"cross-entropy": Loss("xent"), "product": Loss("product"), "confidence": Loss("logconf")}
RATES = (0.25, 0.5, 1.0, 2.0)  # times the task's
FULL = {"RATES": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)}
CLAIMS = [
    Claim(f"{task}: the student is better than its supervisor", f"PGR, {task}", "cross-entropy", 0.0)
    for task in TASKS
] + [
    Claim(f"{task}: the confidence loss recovers more", f"PGR, {task}", "confidence", "cross-entropy")
    for task in TASKS
]  # fmt: skip


@lru_cache(maxsize=16)
def supervised(name: str, seed: int) -> tuple[Tensor, float]:
    """The weak model's labels of the second half, and its accuracy on test."""
    task = TASKS[name](seed)
    weak = weak_model(task)
    soft = predicted(weak, TensorDataset(*task.second)).softmax(1)
    return soft, accuracy(scores(weak, task.held["test"]), task.held["test"].y)


def run(name: str, arm: str, rate: float, seed: int, on: str) -> float:
    task = TASKS[name](seed)
    data = TensorDataset(*task.second)
    if arm == "ceiling":
        soft, loss = F.one_hot(task.second.y, task.classes).float(), Loss("xent")
    else:
        soft, loss = supervised(name, seed)[0], ARMS[arm]
    student = Classifier(task.body, task.width, task.classes)
    weak_to_strong.train_on(student, data, soft, recipe=task.recipe.but(rate=rate * task.recipe.rate), loss=loss)
    return accuracy(scores(student, task.held[on]), task.held[on].y)


def choices() -> dict[str, Choice]:
    def dev(name: str, arm: str) -> Choice:
        return choose(lambda rate, seed, on: run(name, arm, rate, seed, on), {"rate": RATES})

    return {f"{name}, {arm}": dev(name, arm) for name in TASKS for arm in (*ARMS, "ceiling")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"weak model": {}, "ceiling": {}, **{arm: {} for arm in ARMS}}
    for name in TASKS:
        made = {arm: run(name, arm, chosen[f"{name}, {arm}"]["rate"], seed, "test") for arm in (*ARMS, "ceiling")}
        weak = supervised(name, seed)[1]
        for arm, value in {"weak model": weak, **made}.items():
            found[arm][f"accuracy, {name}"] = value
            if arm in ARMS:
                found[arm][f"PGR, {name}"] = weak_to_strong.recovered(value, weak, made["ceiling"])
    return found
