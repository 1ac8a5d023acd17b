"""CLR (arXiv 2307.11386): a network that was trained on digits, frozen, learns transformed digits.

Base: three convolutions (16, 16, 32) with batch-norm. New tasks: inverted digits, their horizontal
gradient, a fixed permutation of the pixels. Arms, each with a head a task: CLR's kernels and norms, norms
alone, the head alone, and all of the network ("forgotten": what the base task loses). Rates are
chosen on dev by the permuted digits. "moved": the largest change of the base task's outputs after all of CLR's tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.classify import inputs_of
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.continual.clr import Clr

from ..data import Split, digits
from ..protocol import Choice, Claim, choose

BATCH, BASE, STEPS = 64, 250, 150
ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(7))
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: 1 - x,
    "gradient": lambda x: (x - x.roll(1, 3)).abs(), "permuted": lambda x: x.flatten(1)[:, ORDER].view_as(x),
}  # fmt: skip
ARMS = {"CLR": (3e-3, 1e-2, 3e-2), "norms": (3e-3, 1e-2, 3e-2), "head": (1e-2, 3e-2, 1e-1), "all": (1e-3, 3e-3, 1e-2)}
CLAIMS = [
    Claim("12 points better than a new head on the frozen network", "accuracy", "CLR", "head", 0.12),
    Claim("5 points better than new norms", "accuracy", "CLR", "norms", 0.05),
    Claim("the base task's outputs do not move", "moved", "CLR", 0.0, -1e-9, "lower"),
    Claim("training all of the network forgets 20 points of the base task", "forgotten", "all", 0.0, 0.2),
]


def pictures(seed: int, on: str) -> Split:
    part = digits(seed)[on]
    return Split(part.x.view(-1, 1, 8, 8), part.y)


@lru_cache(maxsize=16)
def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inner, outer in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    data = shuffled(TensorDataset(*pictures(seed, "train")), BATCH, seed=seed)
    train(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), data, Recipe(BASE, 1e-2, seed=seed))
    return model.eval()


def right(found: Tensor, y: Tensor) -> float:
    return (found.argmax(1) == y).float().mean().item()


def learner(arm: str, seed: int) -> Clr:
    model = Clr(copy.deepcopy(base(seed)))
    model.add()  # the base task
    return model


def learn(model: Clr, arm: str, task: str, rate: float, seed: int) -> int:
    """A task by one of the arms; its number."""
    number = model.begin(10, seed)
    if arm in ("norms", "head"):
        for name, p in zip(model.names, (getattr(model.parts[number], n.replace(".", "/")) for n in model.names),
                           strict=True):  # fmt: skip
            if isinstance(p, nn.Parameter):
                p.requires_grad_(name.startswith(model.head) or (arm == "norms" and not name.endswith(".kernel")))
    if arm == "all":
        model.body.requires_grad_(True)
    (x, y), place = pictures(seed, "train"), TASKS[task]
    recipe = Recipe(STEPS, rate, batch=BATCH, clip=None, seed=seed)

    def loss(one: Any, batch: Any) -> Tensor:
        if arm == "head":  # a frozen network is asked, not trained: its norms keep their statistics
            one.eval()
        return model.loss(inputs_of(batch), batch[1], number)

    train(model, loss, shuffled(TensorDataset(place(x), y), BATCH, seed=seed), recipe)
    model.eval()
    return number


def run(arm: str, rate: float, tasks: Any, seed: int, on: str) -> dict[str, float]:
    model, (x, y) = learner(arm, seed).eval(), pictures(seed, on)
    with torch.no_grad():
        before = model(x, 0)
    found = []
    for task in tasks:
        number = learn(model, arm, task, rate, seed)
        with torch.no_grad():
            found.append(right(model(TASKS[task](x), number), y))
    with torch.no_grad():
        after = model(x, 0)
    return {"accuracy": sum(found) / len(found), "moved": (after - before).abs().max().item(),
            "forgotten": right(before, y) - right(after, y)}  # fmt: skip


def choices() -> dict[str, Choice]:
    return {
        arm: choose(
            lambda rate, seed, on, arm=arm: run(arm, rate, ("permuted",), seed, on)["accuracy"], {"rate": rates}
        )
        for arm, rates in ARMS.items()
    }


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], TASKS, seed, "test") for arm in ARMS}
