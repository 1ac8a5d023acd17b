"""A hidden layer trained by gradient boosting (arXiv 1909.12098): digits, 50 stages of two units.

Standardised pixels, float64; against a network of the same 100 logistic units trained by Adam. The boosting's eta and
Adam's rate are chosen on dev. "rise": the largest rise of the training loss in a stage; "gap": the largest difference
between the assembled network and the sum of the stages; "3/4": with the last quarter of the units left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.layerwise.boosted_layers import Boosted, fit

from ..data import Split, digits
from ..protocol import Choice, Claim, choose

UNITS, STAGE, ITERATIONS, STEPS, BATCH = 100, 2, 100, 600, 64
ETAS, RATES = (0.1, 0.25, 0.5, 1.0), (3e-3, 1e-2, 3e-2)
CLAIMS = [
    Claim("the assembled network is the sum of its stages", "gap", "boosted", 0.0, -1e-10, "lower"),
    Claim("the training loss rises in no stage", "rise", "boosted", 0.0, -1e-9, "lower"),
    Claim("without the last quarter of the units it loses at most 1.5 points", "3/4", "boosted", "all units", -0.015),
    Claim("it loses at most 6 points to Adam", "accuracy", "boosted", "Adam", -0.06),
]


def standardised(seed: int) -> dict[str, Split]:
    data = digits(seed)
    mean, std = data["train"].x.double().mean(0), data["train"].x.double().std(0).clamp_min(0.05)
    return {name: Split((part.x.double() - mean) / std, part.y) for name, part in data.items()}


def right(made: Tensor, split: Split) -> float:
    return (made.argmax(1) == split.y).double().mean().item()


def boosted(eta: float, seed: int) -> Boosted:
    part = standardised(seed)["train"]
    return fit(part.x, part.y, units=UNITS, per_stage=STAGE, eta=eta, iterations=ITERATIONS, seed=seed)


def adam(rate: float, seed: int, on: str) -> float:
    data, draw = standardised(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, UNITS), nn.Sigmoid(), nn.Linear(UNITS, 10)).double()

    def loss(model: nn.Module, _: int) -> Tensor:
        rows = torch.randint(len(data["train"].y), (BATCH,), generator=draw)
        return cross_entropy(model(data["train"].x[rows]), data["train"].y[rows])

    train(model, loss, range(STEPS), Recipe(STEPS, rate, clip=None))
    with torch.no_grad():
        return right(model(data[on].x), data[on])


def choices() -> dict[str, Choice]:
    def ours(eta: float, seed: int, on: str) -> float:
        part = standardised(seed)[on]
        return right(boosted(eta, seed)(part.x), part)

    return {"boosted": choose(ours, {"eta": ETAS}), "Adam": choose(adam, {"rate": RATES})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    part, made = standardised(seed)["test"], boosted(seed=seed, **chosen["boosted"])
    stages = UNITS // STAGE
    shares = {"1/4": stages // 4, "1/2": stages // 2, "3/4": stages - stages // 4}
    losses = torch.tensor(made.losses)
    with torch.no_grad():
        gap = (made.network()(part.x) - made(part.x)).abs().max().item()
    whole = right(made(part.x), part)
    found = {name: right(made(part.x, count), part) for name, count in shares.items()}
    return {
        "boosted": {"accuracy": whole, "gap": gap, "rise": losses.diff().max().clamp_min(0).item(), **found},
        "all units": {"3/4": whole},
        "Adam": {"accuracy": adam(seed=seed, on="test", **chosen["Adam"])},
    }
