"""HyperInterval (arXiv 2405.15444): five tasks in turn without forgetting, and certified for boxes of embeddings.

Permuted digits: ten classes, each time the pixels permuted differently. Accuracy of all tasks in the end, what was lost
since a task was learned, and the accuracy certified for every embedding of a task's box, against plain training of one
network with the same steps. The weight of the regulariser (all ends stay, or only inside) is chosen on dev, by the
certified accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.certified import hyperinterval

from ..data import digits, mlp
from ..protocol import Choice, Claim, choose

TASKS, WIDTH, STEPS = 5, 32, 300
GRID = {"beta": (0.03, 0.3), "hold": ("all ends", "inside")}
FULL = {"GRID": {"beta": (0.01, 0.03, 0.1, 0.3, 1.0), "hold": ("all ends", "inside")}}
CLAIMS = [
    Claim("it forgets less than plain training by 20 points", "lost", "HyperInterval", "plain", 0.2, "lower"),
    Claim("its accuracy in the end is higher", "accuracy", "HyperInterval", "plain"),
    Claim("half of the test pictures are certified for every embedding", "certified", "HyperInterval", 0.5),
]


def tasks(seed: int, on: str) -> list[tuple[TensorDataset, torch.Tensor, torch.Tensor]]:
    """Training data, held-out pictures and labels of each task."""
    draw, parts, found = torch.Generator().manual_seed(seed), digits(seed), []
    for t in range(TASKS):
        order = torch.randperm(64, generator=draw) if t else torch.arange(64)
        train_part, held = parts["train"], parts[on]
        found.append((TensorDataset(train_part.x[:, order], train_part.y), held.x[:, order], held.y))
    return found


def run(seed: int, on: str, beta: float, hold: Any) -> dict[str, float]:
    model, plan, learned = hyperinterval.Hypernetwork((64, WIDTH, 10), TASKS, seed=seed), tasks(seed, on), []

    def right(t: int) -> tuple[float, float]:
        centre, sure = hyperinterval.certified(model, plan[t][1], plan[t][2], t)
        return centre.double().mean().item(), sure.double().mean().item()

    for t, (data, _, _) in enumerate(plan):
        recipe = Recipe(STEPS, 2e-3, batch=64, schedule="constant", clip=None, seed=seed)
        hyperinterval.train(model, data, recipe=recipe, task=t, beta=beta, hold=hold)
        learned.append(right(t)[0])
    last = [right(t) for t in range(TASKS)]
    lost = sum(a - b for a, (b, _) in zip(learned, last, strict=True)) / TASKS
    return {"accuracy": sum(a for a, _ in last) / TASKS, "certified": sum(b for _, b in last) / TASKS, "lost": lost}


def plain(seed: int) -> dict[str, float]:
    model, plan, learned = mlp(64, WIDTH, 10, seed=seed), tasks(seed, "test"), []

    def right(t: int) -> float:
        with torch.no_grad():
            return (model(plan[t][1]).argmax(1) == plan[t][2]).double().mean().item()

    for t, (data, _, _) in enumerate(plan):
        recipe = Recipe(STEPS, 2e-3, batch=64, schedule="constant", clip=None, seed=seed)
        train(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), shuffled(data, 64, seed=seed), recipe)
        learned.append(right(t))
    last = [right(t) for t in range(TASKS)]
    return {"accuracy": sum(last) / TASKS, "lost": sum(a - b for a, b in zip(learned, last, strict=True)) / TASKS}


def choices() -> dict[str, Choice]:
    return {"HyperInterval": choose(lambda **setting: run(**setting)["certified"], GRID)}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {"plain": plain(seed), "HyperInterval": run(seed, "test", **chosen["HyperInterval"])}
