"""Transductive few-shot learning by regularised clustering (arXiv 2106.09516): episodes of five digits, pixels.

Base mean from the digits 0 to 4; 200 episodes of the digits 5 to 9 with 1 or 5 labelled pictures a class and 15 to be
told. SLK-Means (its lambda chosen on dev, for each number of shots), k-means (lambda 0), the nearest mean with the
queries shifted onto the support, and as they are. "rising": the share of steps at fixed prototypes in which the energy
rises by more than 1e-12 of it, in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods.adaptation import clustering

from ..data import digits
from ..protocol import Choice, Claim, choose

EPISODES, QUERIES, CLASSES = 200, 15, 5
SHOTS = (1, 5)
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
CLAIMS = [
    Claim("1 shot: SLK-Means beats the nearest mean by 5 points", "1-shot", "SLK-Means", "nearest", 0.05),
    Claim("5 shots: it beats the nearest mean by half a point", "5-shot", "SLK-Means", "nearest", 0.005),
    Claim("1 shot: it beats k-means", "1-shot", "SLK-Means", "k-means"),
    Claim("the energy never rises", "rising", "SLK-Means", 0.0, -1e-6, "lower"),
]


def episodes(shots: int, seed: int, on: str) -> tuple[Tensor, Tensor, Tensor]:
    """Support ``[E, 5 shots, 64]``, queries ``[E, 75, 64]`` and their labels; the support's are as regular."""
    data, draw = digits(seed), torch.Generator().manual_seed(1000 + seed)
    base = data["train"].x[data["train"].y < CLASSES].double().mean(0)
    support, query = [], []
    for _ in range(EPISODES):
        for c in range(CLASSES):
            rows = data[on].x[data[on].y == CLASSES + c].double()
            rows = rows[torch.randperm(len(rows), generator=draw)[: shots + QUERIES]]
            support.append(rows[:shots])
            query.append(rows[shots:])
    shape = (EPISODES, -1, 64)
    every = (torch.cat(part).view(shape) for part in (support, query))
    one, other = (clustering.centred(part, base) for part in every)
    return one, other, torch.arange(CLASSES).repeat_interleave(QUERIES).expand(EPISODES, -1)


def clustered(shots: int, lam: float, seed: int, on: str) -> tuple[float, float]:
    """Accuracy, and the share of steps that rise."""
    support, query, want = episodes(shots, seed, on)
    y = torch.arange(CLASSES).repeat_interleave(shots).expand(EPISODES, -1)
    found = clustering.slk(support, y, query, CLASSES, lam=lam)
    steps = torch.cat([(e.diff(dim=0) > 1e-12 * e[1:].abs()).flatten() for e in found.energies])
    return (found.assignments.argmax(-1) == want).double().mean().item(), steps.double().mean().item()


def choices() -> dict[str, Choice]:
    return {
        f"{shots}-shot": choose(
            lambda lam, seed, on, shots=shots: clustered(shots, lam, seed, on)[0], {"lam": LAMBDAS}
        ) for shots in SHOTS
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {} for name in ("SLK-Means", "k-means", "shifted", "nearest")}
    rising = []
    for shots in SHOTS:
        name = f"{shots}-shot"
        support, query, want = episodes(shots, seed, "test")
        y = torch.arange(CLASSES).repeat_interleave(shots).expand(EPISODES, -1)
        found["SLK-Means"][name], share = clustered(shots, chosen[name]["lam"], seed, "test")
        rising.append(share)
        found["k-means"][name] = clustered(shots, 0.0, seed, "test")[0]
        shifted = query + (support.mean(1) - query.mean(1))[:, None]
        for arm, rows in (("nearest", query), ("shifted", shifted)):
            labels = clustering.nearest(support, y, rows, CLASSES)
            found[arm][name] = (labels == want).double().mean().item()
    found["SLK-Means"]["rising"] = max(rising)
    return found
