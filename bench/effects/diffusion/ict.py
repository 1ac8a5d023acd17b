"""Improved consistency training (arXiv 2310.14189) against plain consistency training, on two moons.

The same network, steps (1,000 of 512), doubling levels and average of the weights; plain has uniform levels, a squared
distance and weight 1. Sliced Wasserstein distance of one- and two-step samples to fresh true data, with that of true
data to true data as the floor. The rate is chosen for each arm on dev (one-step distance to another draw).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.diffusion import ict

from ..points import TimeMlp, moons, sliced_wasserstein
from ..protocol import Choice, Claim, choose

STEPS, BATCH, SCALE, COUNT, RATES = 1000, 512, 0.5, 8192, (1e-3, 3e-3)  # the moons' deviation is about 1
ARMS = {"iCT": True, "plain consistency": False}
FULL = {"STEPS": 4000, "RATES": (5e-4, 1e-3, 3e-3, 1e-2)}
CLAIMS = [
    Claim("one step: iCT is nearer than plain consistency", "one step", "iCT", "plain consistency", 0.0, "lower"),
    Claim("two steps: nearer too", "two steps", "iCT", "plain consistency", 0.0, "lower"),
    Claim("iCT's second step helps", "two steps", "iCT", "iCT, one step", 0.0, "lower"),
]


class Model(nn.Module):
    """The time features want a number of order 1."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = TimeMlp(depth=3, octaves=4, seed=seed)

    def forward(self, x: Any, noise: Any) -> Any:
        return self.inner(x, noise / 1000)


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    draw, model = torch.Generator().manual_seed(seed), Model(seed)
    average = ict.Average(model, 0.99)

    def loss(model: nn.Module, _: int, step: int) -> Any:
        if step:
            average.update(model)
        return ict.loss(model, SCALE * moons(BATCH, draw), step, STEPS, improved=ARMS[arm], draw=draw)

    train(model, loss, range(STEPS), Recipe(STEPS, rate, seed=seed))
    held = torch.Generator().manual_seed({"dev": 2000, "test": 3000}[on] + seed)
    true = moons(COUNT, held)
    noise, again = (torch.randn(COUNT, 2, generator=held) for _ in range(2))
    made = copy.deepcopy(average.model)
    one, two = ict.sample(made, noise) / SCALE, ict.sample(made, noise, [again]) / SCALE
    return {"one step": sliced_wasserstein(one, true), "two steps": sliced_wasserstein(two, true),
            "true data": sliced_wasserstein(moons(COUNT, held), true)}  # fmt: skip


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on)["one step"], {"rate": RATES},
                        better="lower") for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
    return {**found, "iCT, one step": {"two steps": found["iCT"]["one step"]}}
