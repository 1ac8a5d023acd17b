"""W2SD (arXiv 2502.00473): reflection between a strong and a weak model samples past the strong one.

Two moons with equal shares; the weak model was trained where the second moon is rare (20 %), the strong one fine-tuned
from it where it is less rare (33 %): strong minus weak points where truth minus strong does. Sliced Wasserstein
distance of 50-step samples to true data, against the strong model alone and with as many network passes (148 steps).
Nothing is chosen; the regime builds the paper's premise in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from w2s_fast.methods._common.loop import train
from w2s_fast.methods.diffusion import w2sd

from ..llama import recipe
from ..points import TimeMlp, moons, sliced_wasserstein
from ..protocol import Claim

STEPS, COUNT, BATCH, WEAK, STRONG = 1000, 8192, 1024, 0.2, 1 / 3
FULL = {"STEPS": 4000}
CLAIMS = [
    Claim("nearer to the truth than the strong model", "distance", "W2SD", "strong", 0.0, "lower"),
    Claim("and than the strong model with as many passes", "distance", "W2SD", "strong, 148 steps", 0.0, "lower"),
]


class Model(nn.Module):
    """Of a point and a time label."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = TimeMlp(seed=seed)

    def forward(self, x: Any, t: Any) -> Any:
        return self.inner(x, t / 1000)


def taught(model: Model, share: float, steps: int, rate: float, seed: int) -> Model:
    """To predict the noise in moons of which ``share`` are the second."""
    draw, abar = torch.Generator().manual_seed(seed), w2sd.linear_abar()

    def loss(model: nn.Module, _: int) -> Any:
        return w2sd.noise_loss(model, moons(BATCH, draw, share), abar=abar, draw=draw)

    train(model, loss, range(steps), recipe(steps, rate))
    return model.eval()


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    weak = taught(Model(seed), WEAK, STEPS, 0.02, seed)
    strong = taught(copy.deepcopy(weak), STRONG, STEPS // 2, 0.01, seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    true, again, noise = moons(COUNT, draw), moons(COUNT, draw), torch.randn(COUNT, 2, generator=draw)
    made = {
        "true data": again, "weak": w2sd.sample(weak, weak, noise, reflect_steps=0),
        "strong": w2sd.sample(strong, strong, noise, reflect_steps=0),
        "strong, 148 steps": w2sd.sample(strong, strong, noise, steps=148, reflect_steps=0),
        "W2SD": w2sd.sample(strong, weak, noise),
    }  # fmt: skip
    return {name: {"distance": sliced_wasserstein(cloud, true)} for name, cloud in made.items()}
