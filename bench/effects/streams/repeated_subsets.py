"""RS2 (repeated random sampling, arXiv 2305.18424): a new random part of the digits every round, against a static one.

MLP 64-128-10 on the digits, 60 rounds of a share r of the training pictures, batch 16, SGD with Nesterov momentum 0.9
and a cosine over all steps. Arms: without and with replacement over rounds, and the same static part in every round.
The rate is chosen for each arm on dev at r = 0.05.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset

from w2s_fast.methods.streams.repeated_subsets import train
from w2s_fast.methods.streams.stability_gap import random_part

from ..data import accuracy, digits, mlp
from ..protocol import Choice, Claim, choose

ROUNDS, BATCH = 60, 16
RATES = (0.03, 0.1, 0.3)
ARMS = ("without replacement", "with replacement", "static")
SHARES = (0.02, 0.05, 0.1)
CLAIMS = [
    Claim("r = 0.05: without replacement beats the static part by 8 points", "r=0.05", ARMS[0], "static", 0.08),
    Claim("r = 0.05: without replacement reaches 95 %", "r=0.05", ARMS[0], 0.95, 0.0),
    Claim("r = 0.02: without replacement beats the static part", "r=0.02", ARMS[0], "static", 0.0),
    Claim("r = 0.1: without replacement beats the static part", "r=0.1", ARMS[0], "static", 0.0),
]


def run(arm: str, share: float, rate: float, seed: int, on: str) -> float:
    data, model = digits(seed), mlp(64, 128, 10, seed=seed)
    pictures: Any = TensorDataset(*data["train"])
    if arm == "static":
        part: Subset[Any] = random_part(pictures, int(share * len(pictures)), seed)
        pictures, share = part, 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    train(model, pictures, optimizer, fraction=share, rounds=ROUNDS, batch_size=BATCH,
          replacement=arm == "with replacement", seed=seed)  # fmt: skip
    return accuracy(model, data[on])


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: run(arm, 0.05, rate, seed, on), {"rate": RATES}) for arm in ARMS
    }


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        arm: {f"r={share:g}": run(arm, share, chosen[arm]["rate"], seed, "test") for share in SHARES} for arm in ARMS
    }
