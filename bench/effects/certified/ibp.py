"""IBP and CROWN-IBP (arXiv 1810.12715, 1906.06316): certificates that plain training does not have.

Linear layers 64-128-128-10 on digits, radius 0.1, 30 epochs, the radius rising over half of them. Share of the 360 test
pictures without a certificate (sound in floating point), and plain error. The rate is chosen for each arm on dev, by
the verified error; for plain training by the error.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.certified.ibp import ibp_loss, plain_loss, train_by, verify

from ..data import digits, mlp
from ..protocol import Choice, Claim, choose

METHOD = "ibp"
EPS, EPOCHS, BATCH, RATES = 0.1, 30, 64, (2e-3, 5e-3, 1e-2)
ARMS = ("plain", "IBP", "CROWN-IBP")
FULL = {"RATES": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
CLAIMS = [
    Claim("IBP certifies what plain training does not", "verified error", "IBP", "plain", 0.3, "lower"),
    Claim("CROWN-IBP certifies more than IBP", "verified error", "CROWN-IBP", "IBP", 0.0, "lower"),
]


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    parts, model = digits(seed), mlp(64, 128, 128, 10, seed=seed)
    steps = EPOCHS * len(parts["train"].y) // BATCH
    recipe = Recipe(steps, rate, batch=BATCH, clip=10.0, schedule="linear", floor=0.05, seed=seed)

    def loss(module: Any, x: Any, y: Any, stage: Any) -> Any:
        if arm == "plain":
            return plain_loss(module, x, y, stage)
        return ibp_loss(module, x, y, stage, crown=arm == "CROWN-IBP")

    train_by(model, TensorDataset(*parts["train"]), loss, recipe, EPS, 0.02, 0.5)
    found = verify(model, [tuple(parts[on])], EPS, method="ibp")
    return {"error": 1 - found.accuracy, "verified error": 1 - found.verified}


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, seed: int, on: str) -> float:
        return run(arm, rate, seed, on)["error" if arm == "plain" else "verified error"]

    return {arm: choose(lambda rate, seed, on, arm=arm: value(arm, rate, seed, on), {"rate": RATES}, better="lower")
            for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
