"""Nearest mean on frozen features (arXiv 2210.04428): five tasks of two digits, pixels as features.

Class means of normalised pixels against an MLP 64-128-10 that is trained on one task after the other; accuracy over all
ten digits in the end. The order of the classes is drawn by the seed; the MLP's rate is chosen on dev. "changed": the
share of test pictures whose answer differs when the tasks come in the reverse order and the samples in another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from w2s_fast.methods._common.tasks import class_tasks
from w2s_fast.methods.continual.nearest_mean import NearestMean
from w2s_fast.methods.streams._fit import fit

from ..data import accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

TASKS, EPOCHS, BATCH = 5, 5, 16
RATES = (0.01, 0.03, 0.1)
CLAIMS = [
    Claim("the nearest mean gets 88 % of all classes right", "accuracy", "nearest mean", 0.88),
    Claim("it beats training one task after the other by 60 points", "accuracy", "nearest mean", "fine-tuned", 0.6),
    Claim("the order of the tasks changes no answer", "changed", "nearest mean", 0.0, -1e-3, "lower"),
]


def parts(data: Any, seed: int) -> list[Any]:
    """The tasks with the labels of all classes."""
    whole = TensorDataset(*data)
    tasks = class_tasks(whole, TASKS, seed=seed)
    return [Subset(whole, [i for i, y in enumerate(data.y.tolist()) if y in task.classes]) for task in tasks]


def fine_tuned(rate: float, seed: int, on: str) -> float:
    data, model = digits(seed), mlp(64, 128, 10, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    for part in parts(data["train"], seed):
        for _ in range(EPOCHS):
            fit(model, torch.utils.data.DataLoader(part, BATCH, shuffle=True, generator=draw), optimizer)
    return accuracy(model, data[on])


def means(order: list[Any]) -> NearestMean:
    model = NearestMean(nn.Identity(), 10, 64)
    for part in order:
        model.fit(part)
    return model


def choices() -> dict[str, Choice]:
    return {"fine-tuned": choose(fine_tuned, {"rate": RATES})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    data = digits(seed)
    found = parts(data["train"], seed)
    model = means(found)
    other = means([Subset(part, list(reversed(range(len(part))))) for part in reversed(found)])
    x = data["test"].x
    changed = (model(x).argmax(1) != other(x).argmax(1)).float().mean().item()
    return {
        "nearest mean": {"accuracy": accuracy(model, data["test"]), "changed": changed},
        "fine-tuned": {"accuracy": fine_tuned(seed=seed, on="test", **chosen["fine-tuned"])},
    }
