"""StructTuning (arXiv 2407.16724): facts learned under their path can be asked for by it, others cannot.

240 facts: chapter (6), section (5) and key (8) to one of 20 values; an MLP on three embeddings (24 each, 256-256).
Pre-training for 60 epochs with the path visible (structured) or replaced by a blank (plain), then 20 epochs of
questions, which show the path, on a fifth of the facts; right values of the other four fifths. This shows the
mechanism, memory conditioned on a path, by construction. Sizes and epochs are those of the method's text; the rate of
Adam is chosen for each arm on other draws of the facts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit

from ..protocol import Choice, Claim, choose

SIZES, VALUES, RATES = (6, 5, 8), 20, (3e-4, 1e-3, 3e-3)
ARMS = {"structured": True, "plain": False}
FULL = {"RATES": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
CLAIMS = [
    Claim("structured: at least 95 % of the facts that were never asked", "unseen", "structured", 0.95, 0.0),
    Claim("plain: at most 15 % of them", "unseen", "plain", 0.15, 0.0, "lower"),
]


class Facts(nn.Module):
    """A value from three numbers; number 0 of every embedding is the blank."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embeddings = nn.ModuleList(nn.Embedding(size + 1, 24) for size in SIZES)
            self.layers = nn.Sequential(
                nn.Linear(72, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, VALUES)
            )

    def forward(self, path: Tensor) -> Tensor:
        """Logits ``[B, 20]`` of paths ``[B, 3]``."""
        return self.layers(torch.cat([e(path[:, i]) for i, e in enumerate(self.embeddings)], 1))


def run(structured: bool, rate: float, seed: int) -> dict[str, float]:
    draw, model = torch.Generator().manual_seed(seed), Facts(seed)
    paths = torch.cartesian_prod(*(torch.arange(1, size + 1) for size in SIZES))
    values = torch.randint(VALUES, (len(paths),), generator=draw)
    asked = torch.zeros(len(paths), dtype=torch.bool)
    asked[torch.randperm(len(paths), generator=draw)[: len(paths) // 5]] = True
    shown = paths if structured else torch.zeros_like(paths)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for x, y, epochs in ((shown, values, 60), (paths[asked], values[asked], 20)):
        sampler = MixtureSampler([len(y)], num_samples=epochs * len(y), seed=seed)
        fit(model, DataLoader(TensorDataset(x, y), 32, sampler=sampler), optimizer)
    with torch.no_grad():
        right = model(paths).argmax(1) == values
    return {"unseen": right[~asked].float().mean().item(), "asked": right[asked].float().mean().item()}


def choices() -> dict[str, Choice]:
    def dev(structured: bool) -> Choice:
        return choose(lambda rate, seed, on: run(structured, rate, seed)["unseen"], {"rate": RATES})

    return {arm: dev(structured) for arm, structured in ARMS.items()}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(structured, chosen[arm]["rate"], seed) for arm, structured in ARMS.items()}
