"""Bonsai (arXiv 2203.15516): coloured digits whose colour tells more than the digit, but not everywhere.

A digit in one of two channels, four copies with noise of their own. Label: digit < 5, flipped with probability 0.25;
colour: the label, flipped with 0.1 and 0.2 in the two training environments, with 0.9 at test time. MLP 128-96-96-1,
full batches. Arms: vREx from random weights, from plain training, from the rich features (all of the network, or its
head alone), and plain training of the head on them. The penalty's weight is 1e4 as in the text; each arm's rate is
chosen on dev, which is coloured as at test time, as the paper chooses. The digit alone gives 0.75.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.representation.bonsai import Environment, anew, discover, output, synthesise, train

from ..data import digits, mlp
from ..protocol import Choice, Claim, choose

COPIES, WEIGHT, L2, FIRST, BUILD, STEPS = 4, 1e4, 1.1e-3, 50, 300, 250
RATES = (5e-4, 5e-3)
ARMS: dict[str, dict[str, Any]] = {
    "vREx, random": {}, "vREx, plain": {}, "vREx, rich": {}, "vREx, rich head": {"frozen": True},
    "plain, rich head": {"frozen": True, "penalty": "erm"},
}  # fmt: skip
CLAIMS = [
    Claim("rich features, head alone: 58 % at test time", "accuracy", "vREx, rich head", 0.58),
    Claim("20 points above vREx from plain training", "accuracy", "vREx, rich head", "vREx, plain", 0.2),
    Claim("the second round has found the digit: 60 % at test time", "accuracy", "round 1", 0.6),
]


def environment(x: Tensor, y: Tensor, flips: float, draw: torch.Generator) -> Environment:
    x, y = x.repeat(COPIES, 1), y.repeat(COPIES)
    label = (y < 5) ^ (torch.rand(len(y), generator=draw) < 0.25)
    colour = label ^ (torch.rand(len(y), generator=draw) < flips)
    x = x + 0.1 * torch.randn(x.shape, generator=draw)
    return Environment(torch.cat((x * colour[:, None], x * ~colour[:, None]), 1), label.float())


@lru_cache(maxsize=16)
def data(seed: int) -> dict[str, list[Environment]]:
    parts, draw = digits(seed), torch.Generator().manual_seed(1000 + seed)
    x, y = parts["train"]
    known = [environment(x[i::2], y[i::2], flips, draw) for i, flips in enumerate((0.1, 0.2))]
    return {"train": known, **{on: [environment(*parts[on], 0.9, draw)] for on in ("dev", "test")}}


@lru_cache(maxsize=16)
def rich(seed: int) -> tuple[list[nn.Module], nn.Module]:
    """The rounds' models and the synthesis."""
    x, y = (torch.cat(parts) for parts in zip(*data(seed)["train"], strict=True))
    recipe = Recipe(BUILD, 2e-3, clip=None, schedule="constant", seed=seed)
    found = discover(mlp(128, 96, 96, 1, seed=seed), x, y, recipe, first=FIRST, l2=L2)
    return found.models, synthesise(found.models[0], x, y, found, recipe, l2=L2)


def score(model: nn.Module, seed: int, on: str) -> float:
    (part,) = data(seed)[on]
    with torch.no_grad():
        return ((output(model, part.x) > 0) == part.y.bool()).float().mean().item()


def run(arm: str, rate: float, seed: int, on: str) -> float:
    recipe = Recipe(STEPS, rate, clip=None, schedule="constant", seed=seed)
    model = copy.deepcopy(rich(seed)[1]) if "rich" in arm else anew(mlp(128, 96, 96, 1, seed=seed), seed)
    if arm == "vREx, plain":
        train(model, data(seed)["train"], recipe=recipe.but(rate=2e-3), penalty="erm", rounds=0, l2=L2)
    train(model, data(seed)["train"], recipe=recipe, weight=WEIGHT, rounds=0, l2=L2, **ARMS[arm])
    return score(model, seed, on)


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: {"accuracy": run(arm, chosen[arm]["rate"], seed, "test")} for arm in ARMS}
    for number, model in enumerate(rich(seed)[0]):
        found[f"round {number}"] = {"accuracy": score(model, seed, "test")}
    return found
