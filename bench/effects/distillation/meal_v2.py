"""MEAL V2 (arXiv 2009.08453): an ensemble's outputs against hard labels, and what the discriminator adds.

Two convolutional teachers trained on all 1077 training digits, and a smaller student that hard labels have trained on
100 of them. It goes on with these 100, with the same steps, from hard labels, from the ensemble, and from the ensemble
with the discriminator. Percent of wrong pictures among 10 distorted copies of each of the 360 test digits (moved,
turned, noise): of the 360 alone one is 0.28 points. The rate is chosen for each arm on the distorted dev digits.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.distillation import meal_v2

from ..data import Split, digits
from ..pictures import distorted, error, jitter, network, taught
from ..protocol import Choice, Claim, choose

STEPS, PICTURES, RATES = 800, 100, (1e-3, 3e-3)
ARMS = ("hard labels", "ensemble", "ensemble, discriminator")
FULL = {"RATES": (3e-4, 1e-3, 3e-3, 1e-2)}
CLAIMS = [
    Claim("the ensemble beats hard labels", "error", ARMS[1], ARMS[0], 0.0, "lower"),
    Claim("the discriminator helps", "error", ARMS[2], ARMS[1], 0.0, "lower"),
]


class Moved(Dataset[Tensor]):
    """Pictures, moved anew at every look."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self.x, self.draw = x, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return jitter(self.x[i : i + 1], self.draw)[0]


@lru_cache(maxsize=8)
def prepared(seed: int) -> tuple[list[nn.Module], nn.Module, Split, dict[str, Split]]:
    """Teachers, the student to go on from, its pictures, and the distorted dev and test parts."""
    parts = digits(seed)
    whole = Split(parts["train"].x.view(-1, 1, 8, 8), parts["train"].y)
    recipe = Recipe(STEPS, 3e-3, batch=64, clip=None, seed=seed)
    teachers = [taught(network(w, 100 * seed + w), whole, recipe) for w in (12, 16)]
    few = Split(whole.x[:PICTURES], whole.y[:PICTURES])
    held = {name: distorted(parts[name], 10, 7 + seed) for name in ("dev", "test")}
    return teachers, taught(network(4, seed), few, recipe), few, held


def run(arm: str, rate: float, seed: int, on: str) -> float:
    teachers, first, few, held = prepared(seed)
    student, recipe = copy.deepcopy(first), Recipe(STEPS, rate, batch=64, clip=None, seed=1000 + seed)
    if arm == "hard labels":
        taught(student, few, recipe)
    else:
        meal_v2.train(student, teachers, Moved(few.x, seed), recipe=recipe, discriminate="disc" in arm)
    return error(student, held[on])


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on), {"rate": RATES}, better="lower")
            for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    teachers, first, _, held = prepared(seed)
    found = {"start": {"error": error(first, held["test"])}}
    found |= {f"teacher {i}": {"error": error(t, held["test"])} for i, t in enumerate(teachers)}
    return found | {arm: {"error": run(arm, chosen[arm]["rate"], seed, "test")} for arm in ARMS}
