"""What the distillation methods share: networks for the digits, training that resumes, accuracy, a figure of bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._common import report, training
from .._common.training import Watch

COLOURS = ("#8c9bab", "#5b8cc9", "#2b5c8a", "#d9582b")


def network(width: int, seed: int) -> nn.Sequential:
    """Two convolutions and a Linear for digits ``[N, 64]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * width, 10),
        )  # fmt: skip


def mlp(width: int, seed: int) -> nn.Sequential:
    """One hidden layer for digits ``[N, 64]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def fit(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float, watch: Watch, *, decay: float = 0.0,
    **also: Any,
) -> None:  # fmt: skip
    """AdamW on ``loss(step)``; the rate falls to zero along half a cosine. ``also``: what else of a state loss uses."""
    training.train(model, loss, steps, lambda step: rate * 0.5 * (1 + math.cos(math.pi * step / steps)), training.ALONE,
                   decay=decay, checkpoint=watch.path, every=max(1, steps // 4), key=watch.key, also=also,
                   tick=watch.tick)  # fmt: skip


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Digits ``[N, 64]``, each moved by up to one pixel in either direction."""
    padded = nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    rows, columns = (torch.randint(3, (len(x), 1), generator=generator) + torch.arange(8) for _ in range(2))
    return padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


class Batches:
    """The indices of the next batch at every call, epoch after epoch in a new order."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, size, generator
        self.order = torch.empty(0, dtype=torch.int64)

    def __call__(self) -> Tensor:
        if len(self.order) < self.size:
            self.order = torch.randperm(self.count, generator=self.generator)
        taken, self.order = self.order[: self.size], self.order[self.size :]
        return taken

    def state_dict(self) -> dict[str, Tensor]:
        """What is left of the epoch; the generator's state is the caller's."""
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From `state_dict`."""
        self.order = state["order"]


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of samples that the model gets wrong."""
    return 100 * float((model(x).argmax(1) != y).double().mean())


def bars(title: str, unit: str, rows: dict[str, list[float]]) -> Any:
    """Mean over seeds as a bar a row, every seed as a point; a figure, or None without matplotlib."""
    drawn = report.figure(1.2 + 1.3 * len(rows), 3.2)
    if drawn is None:
        return None
    axis = drawn.subplots()
    for place, (values, colour) in enumerate(zip(rows.values(), COLOURS * len(rows), strict=False)):
        mean = sum(values) / len(values)
        axis.bar(place, mean, color=COLOURS[-1] if place == len(rows) - 1 else colour, width=0.7)
        axis.plot([place] * len(values), values, "k.", markersize=5)
        axis.annotate(f"{mean:.2f}", (place, max(values)), xytext=(0, 4), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axis.set(title=title, ylabel=unit)
    axis.spines[["top", "right"]].set_visible(False)
    return drawn
