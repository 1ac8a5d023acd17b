"""RandLoRA (arXiv 2502.00987): updates of full rank from random factors, against LoRA of as many numbers.

A Llama of width 48 that knows docstrings (`bench.effects.adapted`) learns code for 80 steps: RandLoRA with factors of
rank 3 (11,424 scales, PEFT's scale of 20), LoRA of rank 6 (11,520 numbers). The rate is chosen on dev for each.
"""

from __future__ import annotations

from typing import Any

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import randlora

from .. import adapted
from ..adapted import LENGTH, Arm, Plan
from ..protocol import Claim

RANK, LORA_RANK, STEPS, RATES = 3, 6, 80, (1e-3, 3e-3, 1e-2)
CLAIMS = [
    Claim("RandLoRA beats LoRA", "loss", "RandLoRA", "LoRA", 0.0, "lower"),
    Claim("RandLoRA is at most 0.06 nats behind LoRA", "loss", "RandLoRA", "LoRA", -0.06, "lower"),
]


def random_factors(model: Any, recipe: Recipe) -> Trained:
    return randlora.train(model, None, adapted.rows("code"), recipe=recipe, rank=RANK, length=LENGTH)


ARMS: dict[str, Arm] = {"LoRA": lambda model, recipe: adapted.lora(model, recipe, LORA_RANK),
                        "RandLoRA": random_factors}  # fmt: skip


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, adapted.base, "code", STEPS)


choices, measure = adapted.experiment(plan, start="before")
