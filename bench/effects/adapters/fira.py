"""Fira (arXiv 2410.01623): full-rank steps with moments at low rank, against GaLore, all moments, and low-rank weights.

A Llama of width 48 learns docstrings from random weights (`bench.effects.adapted`): rank 6, projections anew every 40
steps, scale 0.25. Embedding and norms take Adam at 3e-3 in every arm, the matrices their own rate, chosen on dev from
three around its best with half of the 400 steps. Low-rank weights start as the truncated SVD of the same initial ones.
Clipping at 1 only without projection, as in the paper. The limiter is to keep spikes of the loss away. At 3e-2 for the
embedding all arms learn more and differ less (dev, seed 100: AdamW 3.988, Fira 3.980, low rank 4.050, GaLore 4.115).
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

GAP, STEPS, EMBEDDING = 40, 400, 3e-3
CLAIMS = [
    Claim("Fira beats GaLore by 0.35 nats", "loss", "Fira", "GaLore", 0.35, "lower"),
    Claim("Fira beats low-rank weights by 0.15 nats", "loss", "Fira", "low rank", 0.15, "lower"),
    Claim("Fira is at most 0.05 nats behind all moments", "loss", "Fira", "AdamW", -0.05, "lower"),
    Claim("the limiter helps", "loss", "Fira", "Fira without limiter", 0.0, "lower"),
]


def adamw(model: Any, recipe: Recipe, rank: int = 0) -> Trained:
    """All moments, of the matrices or of their factors."""
    if rank:
        convert(model, rank=rank, density=0.0)

    def make(_: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapted.halves(model, rate, EMBEDDING), weight_decay=0.0, fused=True)

    return train_blocks(model, adapted.blocks("general"), recipe.but(optimizer=make))


def projected(residual: bool, **more: Any) -> Arm:
    """GaLore or, with the residual, Fira; ``more`` of the projected group."""

    def arm(model: Any, recipe: Recipe) -> Trained:
        def make(_: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            made = fira.optimizer(model, rate, rank=RANK, gap=GAP, residual=residual)
            made.param_groups[0].update(more)
            made.param_groups[1]["lr"] = EMBEDDING
            return made

        return train_blocks(model, adapted.blocks("general"), recipe.but(optimizer=make, clip=None))

    return arm


ARMS: dict[str, Arm] = {
    "AdamW": adamw, "low rank": lambda model, recipe: adamw(model, recipe, RANK), "GaLore": projected(False),
    "Fira without limiter": projected(True, limit=None), "Fira": projected(True),
}  # fmt: skip
RATES = {"AdamW": (3e-3, 1e-2, 3e-2), "low rank": (1e-3, 3e-3, 1e-2)}  # of the others:
PROJECTED = (3e-2, 1e-1, 3e-1)


def plan() -> Plan:
    grids = {arm: {"rate": RATES.get(arm, PROJECTED)} for arm in ARMS}
    return Plan(ARMS, grids, adapted.untrained, "general", STEPS, STEPS // 2, shown=160)


choices, measure = adapted.experiment(plan)
