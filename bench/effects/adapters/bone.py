"""Bone (arXiv 2409.15371): adapters of square blocks, MiSS and BAT, against LoRA of as many numbers.

A Llama of width 48 that knows docstrings (`bench.effects.adapted`) learns code for 80 steps: MiSS and BAT of rank 16
(16,896 numbers), LoRA of rank 9 (17,280), or the adapted matrices themselves. The rate is chosen on dev for each.
*Forgotten* is what it costs on docstrings.
"""

from __future__ import annotations

from typing import Any

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import bone

from .. import adapted
from ..adapted import LENGTH, Arm, Plan
from ..protocol import Claim

RANK, LORA_RANK, STEPS, RATES = 16, 9, 80, (3e-3, 1e-2, 3e-2)
SEEDS = range(10)
CLAIMS = [
    Claim("MiSS beats LoRA", "loss", "MiSS", "LoRA", 0.0, "lower"),
    Claim("BAT beats LoRA", "loss", "BAT", "LoRA", 0.0, "lower"),
    Claim("MiSS is at most 0.03 nats behind LoRA", "loss", "MiSS", "LoRA", -0.03, "lower"),
    Claim("BAT is at most 0.03 nats behind LoRA", "loss", "BAT", "LoRA", -0.03, "lower"),
]


def blockwise(kind: str) -> Arm:
    def arm(model: Any, recipe: Recipe) -> Trained:
        return bone.train(model, None, adapted.rows("code"), recipe=recipe, kind=kind, rank=RANK, length=LENGTH)

    return arm


ARMS: dict[str, Arm] = {
    "matrices": adapted.all_projections, "LoRA": lambda model, recipe: adapted.lora(model, recipe, LORA_RANK),
    "MiSS": blockwise("miss"), "BAT": blockwise("bat"),
}  # fmt: skip


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, adapted.base, "code", STEPS)


choices, measure = adapted.experiment(plan, start="before")
