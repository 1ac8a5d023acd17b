"""ALLoRA (arXiv 2410.09692): larger steps for small rows of the adapter, against LoRA of the same rank and scale.

A Llama of width 48 that knows docstrings (`bench.effects.adapted`) learns code for 80 steps with adapters of rank 9
and scale 1, no dropout. The rate is chosen on dev for both, and ALLoRA's eta.
"""

from __future__ import annotations

from typing import Any

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import allora

from .. import adapted
from ..adapted import LENGTH, Arm, Plan
from ..protocol import Claim

RANK, STEPS, RATES, ETAS = 9, 80, (3e-3, 1e-2, 3e-2), (2.0, 10.0)
CLAIMS = [
    Claim("ALLoRA beats LoRA", "loss", "ALLoRA", "LoRA", 0.0, "lower"),
    Claim("ALLoRA is at most 0.02 nats behind LoRA", "loss", "ALLoRA", "LoRA", -0.02, "lower"),
]


def rescaled(model: Any, recipe: Recipe, eta: float) -> Trained:
    return allora.train(model, None, adapted.rows("code"), recipe=recipe, rank=RANK, eta=eta, length=LENGTH)


ARMS: dict[str, Arm] = {"LoRA": lambda model, recipe: adapted.lora(model, recipe, RANK, 1.0), "ALLoRA": rescaled}


def plan() -> Plan:
    grids = {"LoRA": {"rate": RATES}, "ALLoRA": {"rate": RATES, "eta": ETAS}}
    return Plan(ARMS, grids, adapted.base, "code", STEPS)


choices, measure = adapted.experiment(plan, start="before")
