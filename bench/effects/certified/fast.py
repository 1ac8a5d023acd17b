"""Fast certified training (arXiv 2103.17268): a short ramp with the paper's initialisation, batch-norm, regularisers.

CNN-7 of width 8 (16 in the long form) on digits, radius 0.1, 18 epochs, 8 of them the ramp. Share of test pictures
without a certificate for plain IBP (no batch-norm, kappa to 1/2), batch-norm alone, and all of the paper; and how far
the radius of the box grows from the first ReLU to the last before training. The rate is chosen for each arm on dev, by
the verified error.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.certified.fast import fast_loss, growth, initialise, robust_loss
from w2s_fast.methods.certified.ibp import ibp_loss, linear, smoothed, train_by, verify

from ..data import cnn7, digits
from ..protocol import Choice, Claim, choose

EPS, EPOCHS, RAMP, BATCH, WIDTH, RATES = 0.1, 18, 8, 64, 8, (4e-3, 8e-3)
ARMS = {
    "IBP": (False, ibp_loss, linear), "batch-norm": (True, robust_loss, smoothed), "paper": (True, fast_loss, smoothed),
}  # fmt: skip
FULL = {"WIDTH": 16, "RATES": (2e-3, 4e-3, 8e-3, 1.6e-2)}
CLAIMS = [
    Claim("the paper certifies more than batch-norm alone", "verified error", "paper", "batch-norm", 0.0, "lower"),
    Claim("and more than plain IBP", "verified error", "paper", "IBP", 0.0, "lower"),
    Claim("its initialisation keeps the radius within a factor of 4", "growth", "paper", 4.0, 0.0, "lower"),
]


def start(arm: str, seed: int) -> Any:
    model = cnn7(WIDTH, seed, norm=ARMS[arm][0])
    if arm == "paper":
        initialise(model, seed)
    return model


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    parts, (_, loss, ramp) = digits(seed), ARMS[arm]
    x, y = parts["train"].x.view(-1, 1, 8, 8), parts["train"].y
    model, steps = start(arm, seed), EPOCHS * len(y) // BATCH
    grown = growth(start(arm, seed).eval(), x[:200], EPS)
    recipe = Recipe(steps, rate, batch=BATCH, clip=10.0, schedule="linear", floor=0.05, seed=seed)
    train_by(model, TensorDataset(x, y), loss, recipe, EPS, 1 / EPOCHS, (1 + RAMP) / EPOCHS, ramp=ramp)
    held = parts[on]
    found = verify(model, [(held.x.view(-1, 1, 8, 8), held.y)], EPS, method="ibp")
    return {"error": 1 - found.accuracy, "verified error": 1 - found.verified, "growth": grown}


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on)["verified error"], {"rate": RATES},
                        better="lower") for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
