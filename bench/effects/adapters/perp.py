"""PERP (arXiv 2312.15230): how much of a full retraining after pruning norms, biases and masked adapters recover.

A pre-trained Llama of width 48 (`bench.effects.adapted`) loses 70 % of every projection by magnitude and learns
docstrings for 80 more steps: in its norms (240 numbers), with a bias on every projection, with MaskLoRA of rank 6 too,
or in all weights that are left. The rate is chosen on dev for each. *Recovered* is the share of what full retraining
regains.
"""

from __future__ import annotations

from typing import Any

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import perp, spdf

from .. import adapted
from ..adapted import LENGTH, RANK, Arm, Plan
from ..protocol import Choice, Claim

SPARSITY, STEPS, RATES = 0.7, 80, (3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = range(10)
CLAIMS = [
    Claim("norms alone recover 45 % of what full retraining does", "recovered", "norms", 0.45),
    Claim("with biases 60 %", "recovered", "biases", 0.6),
    Claim("with masked adapters 88 %", "recovered", "MaskLoRA", 0.88),
    Claim("masked adapters beat norms and biases alone", "loss", "MaskLoRA", "biases", 0.0, "lower"),
]


def parts(*which: str) -> Arm:
    """PERP with these parts."""

    def arm(model: Any, recipe: Recipe) -> Trained:
        return perp.train(model, None, adapted.rows("general"), recipe=recipe, sparsity=0.0, parts=which, rank=RANK,
                          length=LENGTH)  # fmt: skip

    return arm


def full(model: Any, recipe: Recipe) -> Trained:
    """All weights but those that are pruned."""
    return spdf.train(model, None, adapted.rows("general"), recipe=recipe, sparsity=0.0, length=LENGTH)


ARMS: dict[str, Arm] = {"norms": parts("norms"), "biases": parts("norms", "biases"),
                        "MaskLoRA": parts("norms", "biases", "adapters"), "full": full}  # fmt: skip


def pruned(seed: int) -> Any:
    model = adapted.base(seed)
    perp.prune(model, SPARSITY)
    return model


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, pruned, "general", STEPS)


def choices() -> dict[str, Choice]:
    return adapted.choices(plan())


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = adapted.measure(plan(), seed, chosen, start="pruned")
    worst, best = (found[arm]["loss"] for arm in ("pruned", "full"))
    for arm in ARMS:
        found[arm]["recovered"] = (worst - found[arm]["loss"]) / (worst - best)
    return found
