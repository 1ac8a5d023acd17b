"""Hard batches (arXiv 2304.03486): the hardest 30 % of the batches against random ones, at equal numbers of updates.

MLP 64-64-10, SGD, batch 16, 40 epochs of ranking and training on the hardest 30 % of the batches; random batches and
single samples of the highest loss with as many updates. Once on the digits as they are, once with the classes 8 and 9
cut to 12 training pictures each. The rate is chosen for each arm on dev, on the data with rare classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from w2s_fast.data import HardBatchSampler, MixtureSampler
from w2s_fast.methods.streams._fit import classification_losses, fit, losses_of
from w2s_fast.methods.streams.hard_batches import train_epoch
from w2s_fast.metrics import select_topk

from ..data import Split, accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

EPOCHS, BATCH, DELTA = 40, 16, 0.3
RATES = (0.05, 0.1, 0.2, 0.4)
ARMS = ("hard batches", "random batches", "hard samples")
FULL = {"RATES": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}
CLAIMS = [
    Claim("rare classes: hard batches beat random ones by 3 points", "rare: all", ARMS[0], ARMS[1], 0.03),
    Claim("rare classes: by 15 points on the rare ones", "rare: 8 and 9", ARMS[0], ARMS[1], 0.15),
    Claim("balanced digits: hard batches beat random ones", "balanced: all", ARMS[0], ARMS[1], 0.0),
    Claim("rare classes: single hard samples beat hard batches", "rare: all", ARMS[2], ARMS[0], 0.0),
]


def rare(split: Split) -> Split:
    """The classes 8 and 9 cut to 12 pictures each."""
    keep = split.y < 8
    for label in (8, 9):
        keep[(split.y == label).nonzero()[:12, 0]] = True
    return Split(split.x[keep], split.y[keep])


def run(arm: str, kind: str, rate: float, seed: int, on: str) -> dict[str, float]:
    data, model = digits(seed), mlp(64, 64, 10, seed=seed)
    pictures = TensorDataset(*(rare(data["train"]) if kind == "rare" else data["train"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    sampler = HardBatchSampler(len(pictures), BATCH, DELTA, seed=seed)
    if arm == "hard batches":
        for epoch in range(EPOCHS):
            train_epoch(model, pictures, sampler, optimizer, epoch)
    elif arm == "random batches":
        draws = MixtureSampler([len(pictures)], num_samples=EPOCHS * len(sampler) * BATCH, seed=seed)
        fit(model, DataLoader(pictures, BATCH, sampler=draws), optimizer)
    else:
        for _ in range(EPOCHS):
            hardest = select_topk(losses_of(model, pictures, 1024, classification_losses), len(sampler) * BATCH)
            fit(model, DataLoader(pictures, batch_sampler=hardest.view(-1, BATCH).tolist()), optimizer)
    few = data[on].y >= 8
    return {
        f"{kind}: all": accuracy(model, data[on]),
        f"{kind}: 8 and 9": accuracy(model, Split(data[on].x[few], data[on].y[few])),
    }


def choices() -> dict[str, Choice]:
    def dev(arm: str) -> Choice:
        return choose(lambda rate, seed, on: run(arm, "rare", rate, seed, on)["rare: all"], {"rate": RATES})

    return {arm: dev(arm) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    def both(arm: str) -> dict[str, float]:
        balanced, few = (run(arm, kind, chosen[arm]["rate"], seed, "test") for kind in ("balanced", "rare"))
        return {**balanced, **few}

    return {arm: both(arm) for arm in ARMS}
