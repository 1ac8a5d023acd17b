"""Tricks for few-shot class-incremental learning (arXiv 2403.14392): six digits first, then two and two by five shots.

Convolutions 16, 32, pooling, 64, mean over places; cosine logits with scale 16, two views of every picture moved
about. Afterwards the encoder is frozen and classes are the means of their features. Arms: cross-entropy alone, with
the supervised contrastive loss, and with a fixed simplex frame of ten classes too. The rate of each is chosen on dev
by the accuracy over all ten classes.

Found: over 15 seeds SupCon gives 0.3 points over all classes and takes 1.4 on the new ones, where these test pictures
resolve 1.9 and 3.8 points: the 1.5 and 3 asked for are neither shown nor excluded by much. The frame takes 1.9
(resolved 2.5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.views import moved_about
from w2s_fast.methods.continual.few_shot_increments import Increments, train

from ..data import digits
from ..protocol import Choice, Claim, choose

BASE, SESSIONS, SHOTS, STEPS, BATCH = 6, ((6, 7), (8, 9)), 5, 200, 64
RATES = (2e-3, 5e-3, 1e-2)
SEEDS = tuple(range(15))  # five seeds resolve 3.5 points
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"contrast": 0.0}, "SupCon": {}, "SupCon, frame": {"frame": 10},
}  # fmt: skip
CLAIMS = [
    Claim("SupCon beats plain training by 1.5 points over all ten classes", "all", "SupCon", "plain", 0.015),
    Claim("by 3 points on the new classes", "new", "SupCon", "plain", 0.03),
    Claim("the simplex frame adds to it", "all", "SupCon, frame", "SupCon"),
]


def view(x: Tensor, draw: torch.Generator) -> Tensor:
    return moved_about(x, draw, angle=0.26, shift=0.12, scale=0.15)


def encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, BASE),
    )  # fmt: skip


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    parts = {name: (part.x.view(-1, 1, 8, 8), part.y) for name, part in digits(seed).items()}
    (x, y), draw = parts["train"], torch.Generator().manual_seed(1000 + seed)
    whole = TensorDataset(x, y)
    base = Subset(whole, (y < BASE).nonzero()[:, 0].tolist())
    model = encoder(seed)
    train(model, base, recipe=Recipe(STEPS, rate, batch=BATCH, clip=None, seed=seed), view=view, **ARMS[arm])
    session = Increments(model, 10)
    session.fit(base)
    for classes in SESSIONS:
        rows = [(y == c).nonzero()[:, 0] for c in classes]
        chosen = [i for r in rows for i in r[torch.randperm(len(r), generator=draw)[:SHOTS]].tolist()]
        session.fit(Subset(whole, chosen))
    x, y = parts[on]
    right = (session(x).argmax(1) == y).float()
    return {"all": right.mean().item(), "old": right[y < BASE].mean().item(), "new": right[y >= BASE].mean().item()}


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on)["all"], {"rate": RATES}) for arm in ARMS
    }


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
