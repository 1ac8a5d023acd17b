"""SST (arXiv 2405.15481): all singular values and a few singular vectors at a time, against low-rank training.

A Llama of width 48 learns docstrings from random weights (`bench.effects.adapted`) with rank 6: SST (iterations of 40
steps, a new SVD every 4); LoRA beside frozen random weights; ReLoRA, which merges every 40 steps and begins again. One
rate for all parameters of an arm, chosen on dev with half of the 400 steps. *Closed* is the share of the gap between
LoRA and full training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.language import Sequences, cross_entropy
from w2s_fast.methods._common.loop import Recipe, Trained, train
from w2s_fast.methods.adapters import perp, sst
from w2s_fast.methods.sparse_lowrank.sltrain import train_blocks

from .. import adapted
from ..adapted import LENGTH, RANK, Arm, Plan
from ..protocol import Choice, Claim

GAP, WARM, STEPS, RATES = 40, 5, 400, (3e-3, 1e-2, 3e-2)
CLAIMS = [
    Claim("SST beats LoRA by 0.12 nats", "loss", "SST", "LoRA", 0.12, "lower"),
    Claim("SST beats ReLoRA by 0.15 nats", "loss", "SST", "ReLoRA", 0.15, "lower"),
    Claim("SST closes a quarter of the gap between LoRA and full training", "closed", "SST", 0.25),
]


def full(model: Any, recipe: Recipe) -> Trained:
    """All weights."""
    return train_blocks(model, adapted.blocks("general"), recipe)


def spectral(model: Any, recipe: Recipe) -> Trained:
    return sst.train(model, None, adapted.rows("general"), recipe=recipe, rank=RANK, iteration=GAP, rewarm=WARM,
                     length=LENGTH)  # fmt: skip


@torch.no_grad()
def restart(model: nn.Module, optimizer: torch.optim.Optimizer, draw: torch.Generator) -> None:
    """ReLoRA: the adapters into the weights, new ones, no moments."""
    for part in model.modules():
        if isinstance(part, nn.utils.parametrize.ParametrizationList):
            for adapter in part:
                part.original.copy_(adapter(part.original))
                bound = adapter.A.shape[1] ** -0.5
                adapter.A.copy_(torch.empty(adapter.A.shape).uniform_(-bound, bound, generator=draw))
                adapter.B.zero_()
                optimizer.state.pop(adapter.A, None)
                optimizer.state.pop(adapter.B, None)


def lora(gap: int) -> Arm:
    """LoRA of the projections, all else trained; with a gap ReLoRA."""

    def arm(model: Any, recipe: Recipe) -> Trained:
        perp.prepare(model, ("norms", "adapters"), rank=RANK, seed=recipe.seed)
        model.get_input_embeddings().requires_grad_(True)
        made: list[torch.optim.Optimizer] = []
        draw = torch.Generator().manual_seed(recipe.seed)

        def make(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            made.append(torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True))
            return made[-1]

        def loss(model: Any, ids: Tensor, step: int) -> Tensor:
            if gap and step and step % gap == 0:
                restart(model, made[-1], draw)
            return cross_entropy(model, Sequences(ids, torch.ones_like(ids), ids))

        def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
            def factor(step: int) -> float:
                return recipe.factor(step) * (min(1.0, (step % gap + 1) / WARM) if gap else 1.0)

            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

        data = shuffled(adapted.blocks("general"), recipe.batch, seed=recipe.seed)
        done = train(model, loss, data, recipe.but(optimizer=make, schedule=schedule))
        perp.merge(model)
        return done

    return arm


ARMS: dict[str, Arm] = {"full": full, "LoRA": lora(0),
                        "ReLoRA": lora(GAP), "SST": spectral}  # fmt: skip


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, adapted.untrained, "general", STEPS, STEPS // 2)


def choices() -> dict[str, Choice]:
    return adapted.choices(plan())


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = adapted.measure(plan(), seed, chosen)
    gap = found["LoRA"]["loss"] - found["full"]["loss"]
    found["SST"]["closed"] = (found["LoRA"]["loss"] - found["SST"]["loss"]) / gap
    return found
