"""Efficiently robustify pre-trained models (arXiv 2309.07499): a small robust model tunes a part of a large one.

Large: MLP 64-256-256-10 on clean digits; small: 64-48-48-10 on clean and perturbed ones (noise, dead and lit pixels).
The large one is tuned for 200 steps: on 100 labels, all of it or layers 2 and 3; or without labels by the two
teachers, again all of it or the part. Accuracy on clean and on three perturbed copies of unseen pictures; rates chosen
on dev by their mean.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.adaptation import robustify

from ..data import Split, accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

LABELS, STEPS, BATCH, PART = 100, 200, 48, "2,4"
RATES = (3e-3, 1e-2)
ARMS = ("teachers, part", "teachers, all", "labels, part", "labels, all")
CLAIMS = [
    Claim("teachers, part: 2 points more robust than the large model", "robust", "teachers, part", "large", 0.02),
    Claim("1 point more robust than all of it on labels", "robust", "teachers, part", "labels, all", 0.01),
    Claim("1.5 points better on clean pictures than that", "clean", "teachers, part", "labels, all", 0.015),
    Claim("the part is as robust as all of it, up to 1 point", "robust", "teachers, part", "teachers, all", -0.01),
]


def perturbed(x: Tensor, draw: torch.Generator) -> Tensor:
    """Noise and dead or lit pixels, of a strength drawn for each picture."""
    r = torch.rand(len(x), 1, generator=draw)
    hit = torch.rand(x.shape, generator=draw) < 0.25 * r
    lit = torch.rand(x.shape, generator=draw).round()
    return torch.where(hit, lit, x + 0.45 * r * torch.randn(x.shape, generator=draw))


def taught(model: nn.Module, data: Any, steps: int, rate: float, seed: int, robust: bool) -> None:
    draw = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if robust:
            x, y = torch.cat((x, perturbed(x, draw))), y.repeat(2)
        return cross_entropy(model(x), y)

    recipe = Recipe(steps, rate, schedule="linear", clip=None, seed=seed)
    train(model, loss, shuffled(data, BATCH, seed=seed), recipe)


@lru_cache(maxsize=16)
def models(seed: int) -> tuple[nn.Module, nn.Module]:
    """Large and small."""
    data = TensorDataset(*digits(seed)["train"])
    large, small = mlp(64, 256, 256, 10, seed=seed), mlp(64, 48, 48, 10, seed=seed)
    taught(large, data, 250, 2e-3, seed, False)
    taught(small, data, 500, 4e-3, seed, True)
    return large, small


def scores(model: nn.Module, seed: int, on: str) -> dict[str, float]:
    x, y = digits(seed)[on]
    hard = perturbed(x.repeat(3, 1), torch.Generator().manual_seed(11))
    return {"clean": accuracy(model, Split(x, y)), "robust": accuracy(model, Split(hard, y.repeat(3)))}


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    data, (large, small) = digits(seed)["train"], models(seed)
    model, part = copy.deepcopy(large), PART if arm.endswith("part") else ""
    recipe = Recipe(STEPS, rate, batch=BATCH, schedule="linear", clip=None, seed=seed)
    if arm.startswith("teachers"):
        robustify.train(model, small, TensorDataset(data.x), recipe=recipe, part=part, perturb=perturbed)
    else:
        frozen = robustify.frozen_but(model, part)
        taught(model, TensorDataset(data.x[:LABELS], data.y[:LABELS]), STEPS, rate, seed, True)
        assert len(frozen) == (2 if part else 0)
    return scores(model, seed, on)


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: sum(run(arm, rate, seed, on).values()) / 2, {"rate": RATES})
        for arm in ARMS
    }


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
    large, small = models(seed)
    return {**found, "large": scores(large, seed, "test"), "small": scores(small, seed, "test")}
