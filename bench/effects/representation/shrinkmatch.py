"""ShrinkMatch (arXiv 2308.06777): digits with two labels a class, the other training pictures without.

MLP 64-128-128 with batch-norm, 20 labelled and 80 unlabelled pictures a step, threshold 0.95, distribution alignment
over 32 batches, the mean teacher (0.99) is asked. Weak view: moved about a little; strong: three times as far,
contrast, noise, a 3 x 3 hole. Arms: ShrinkMatch, FixMatch (without the shrunk loss), the labels alone in the weak
view. Each arm's rate is chosen on dev.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.views import moved_about, noisy
from w2s_fast.methods.representation.shrinkmatch import train

from ..data import Split, accuracy, digits
from ..protocol import Choice, Claim, choose

LABELS, STEPS, BATCH = 2, 500, 80
RATES = (1e-3, 3e-3, 1e-2)
ARMS: dict[str, dict[str, Any]] = {"ShrinkMatch": {}, "FixMatch": {"shrink": False}, "labels": {"th": 1.0}}
CLAIMS = [
    Claim("FixMatch beats the labels alone by 6 points", "accuracy", "FixMatch", "labels", 0.06),
    Claim("ShrinkMatch beats the labels alone by 6 points", "accuracy", "ShrinkMatch", "labels", 0.06),
    Claim("ShrinkMatch beats FixMatch", "accuracy", "ShrinkMatch", "FixMatch"),
]


def weak(x: Tensor, draw: torch.Generator) -> Tensor:
    return moved_about(x, draw, angle=0.1, shift=0.12, scale=0.05)


def strong(x: Tensor, draw: torch.Generator) -> Tensor:
    x = moved_about(x, draw, angle=0.45, shift=0.3, scale=0.2)
    contrast = 1 - 0.5 * torch.rand(len(x), 1, 1, 1, generator=draw)
    light = 0.3 * torch.rand(len(x), 1, 1, 1, generator=draw) * (1 - contrast)
    x = noisy(x * contrast + light, draw, 0.12)
    corner, places = torch.randint(6, (2, len(x), 1), generator=draw), torch.arange(8)
    down, across = ((places >= c) & (places < c + 3) for c in corner)
    return x.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for inner in (64, 128) for m in (nn.Linear(inner, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))


def run(arm: str, rate: float, seed: int, on: str) -> float:
    data, draw = digits(seed), torch.Generator().manual_seed(seed)
    x, y = data["train"].x.view(-1, 1, 8, 8), data["train"].y
    order = torch.randperm(len(y), generator=draw)
    few = [i for c in range(10) for i in order[y[order] == c][:LABELS].tolist()]
    model, known = network(seed), Subset(TensorDataset(x, y), few)
    recipe = Recipe(STEPS, rate, batch=BATCH, decay=5e-4, clip=None, seed=seed)
    view = weak if arm == "labels" else strong
    train(model, TensorDataset(x), known, recipe=recipe, momentum=0.99, weak=weak, strong=view,
          **{"shrink": arm != "labels", **ARMS[arm]})  # fmt: skip
    return accuracy(model.eval(), Split(data[on].x, data[on].y))


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: {"accuracy": run(arm, chosen[arm]["rate"], seed, "test")} for arm in ARMS}
