"""Fira (arXiv 2410.01623): full-rank steps with moments at low rank, against GaLore, all moments, and low-rank weights.

A Llama of width 48 learns docstrings from random weights (`bench.effects.adapted`): rank 6, projections anew every 40
steps, scale 0.25. Embedding and norms take Adam at 3e-2 in every arm, the matrices their own rate, chosen on dev with
half of the 240 steps. Low-rank weights start as the truncated SVD of the same initial ones. Clipping at 1 only without
projection, as in the paper. The limiter is to keep spikes of the loss away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import fira
from w2s_fast.methods.sparse_lowrank.sltrain import convert, train_blocks

from .. import adapted
from ..adapted import RANK, Arm, Plan
from ..protocol import Claim

GAP, STEPS, RATES = 40, 240, (3e-3, 1e-2, 3e-2, 1e-1)
CLAIMS = [
    Claim("Fira beats GaLore", "loss", "Fira", "GaLore", 0.1, "lower"),
    Claim("Fira beats low-rank weights", "loss", "Fira", "low rank", 0.05, "lower"),
    Claim("Fira is at most 0.05 nats behind all moments", "loss", "Fira", "AdamW", -0.05, "lower"),
    Claim("the limiter helps", "loss", "Fira", "Fira without limiter", 0.0, "lower"),
]


def adamw(model: Any, recipe: Recipe, rank: int = 0) -> Trained:
    """All moments, of the matrices or of their factors."""
    if rank:
        convert(model, rank=rank, density=0.0)

    def make(_: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapted.halves(model, rate), weight_decay=0.0, fused=True)

    return train_blocks(model, adapted.blocks("general"), recipe.but(optimizer=make))


def projected(residual: bool, **more: Any) -> Arm:
    """GaLore or, with the residual, Fira; ``more`` of the projected group."""

    def arm(model: Any, recipe: Recipe) -> Trained:
        def make(_: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            made = fira.optimizer(model, rate, rank=RANK, gap=GAP, residual=residual)
            made.param_groups[0].update(more)
            made.param_groups[1]["lr"] = adapted.REST
            return made

        return train_blocks(model, adapted.blocks("general"), recipe.but(optimizer=make, clip=None))

    return arm


ARMS: dict[str, Arm] = {
    "AdamW": adamw, "low rank": lambda model, recipe: adamw(model, recipe, RANK), "GaLore": projected(False),
    "Fira without limiter": projected(True, limit=None), "Fira": projected(True),
}  # fmt: skip


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, adapted.untrained, "general", STEPS, STEPS // 2,
                shown=160)  # fmt: skip


choices, measure = adapted.experiment(plan)
