"""Competitive distillation (CoMD, arXiv 2311.08213): is what the student cannot do yet the better thing to teach?

Teacher MLP 64-256-256-10 on 900 digits, student 64-48-48-10 that learns from the teacher's outputs on distorted digits
without labels: 250 random ones of 1800 first, then 3 rounds add 100: those with the largest divergence of the student
from the teacher, drawn in proportion to it, or random ones; 100 steps a round, going on. Percent right on the test
digits and on a distorted copy of each. The rate is chosen on dev for each arm; ten seeds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2s_fast.attacks import Stacked
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.distillation.competitive_distillation import select
from w2s_fast.ops.linear_loss.kd import kd_loss

from ..data import digits, mlp
from ..pictures import distorted
from ..protocol import Choice, Claim
from ..robust import at_best_rates, best_rates

FIRST, ADD, ROUNDS, STEPS, RATES, SEEDS = 250, 100, 4, 100, (1e-3, 3e-3, 1e-2), tuple(range(10))
ARMS: Any = ("random", "gap", "sampled")
FULL = {"RATES": (1e-3, 3e-3, 1e-2, 2e-2, 3e-2)}
CLAIMS = [
    Claim("the largest gaps beat random choice", "right", "gap", "random"),
    Claim("gaps as probabilities beat random choice", "right", "sampled", "random"),
]


@lru_cache(maxsize=4)
def prepared(seeds: tuple[int, ...], on: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool ``[S, 1800, 64]``, the teacher's logits of it, held-out digits with labels, half of them distorted."""
    splits = [digits(seed) for seed in seeds]
    stack = Stacked([mlp(64, 256, 256, 10, seed=9000 + s) for s in seeds])
    draw = torch.Generator().manual_seed(seeds[0])
    x, y = torch.stack([d["train"].x[:900] for d in splits]), torch.stack([d["train"].y[:900] for d in splits])
    row = torch.arange(len(seeds))[:, None]

    def loss(stack: Any, _: int) -> Tensor:
        rows = torch.randint(900, (len(seeds), 64), generator=draw)
        return len(seeds) * F.cross_entropy(stack(x[row, rows]).flatten(0, 1), y[row, rows].flatten())

    train(stack, loss, range(50), Recipe(250, 2e-3, clip=None, schedule="linear"))
    pool = torch.stack([distorted(d["train"]._replace(x=d["train"].x[:900], y=d["train"].y[:900]), 2, s).x.flatten(1)
                        for s, d in zip(seeds, splits, strict=True)])  # fmt: skip
    moved = [distorted(d[on], 1, 77).x.flatten(1) for d in splits]
    held = torch.stack([torch.cat((d[on].x, m)) for d, m in zip(splits, moved, strict=True)])
    with torch.no_grad():
        told = stack(pool)
    return pool, told, held, torch.stack([d[on].y.repeat(2) for d in splits])


@lru_cache(maxsize=64)
def table(arm: str, rate: float, seeds: tuple[int, ...], on: str) -> dict[int, float]:
    pool, told, held, y = prepared(seeds, on)
    stack, row = Stacked([mlp(64, 48, 48, 10, seed=s + 9) for s in seeds]), torch.arange(len(seeds))[:, None]
    draw = torch.Generator().manual_seed(seeds[0])
    taken = torch.stack([torch.randperm(pool.shape[1], generator=draw)[:FIRST] for _ in seeds])

    def loss(stack: Any, _: int) -> Tensor:
        rows = taken[row, torch.randint(taken.shape[1], (len(seeds), 48), generator=draw)]
        x = pool[row, rows] + 0.1 * torch.randn(len(seeds), 48, 64, generator=draw)
        return len(seeds) * kd_loss(stack(x), [("logits", told[row, rows])], kind="fkl")[0]

    for turn in range(ROUNDS):
        if turn:
            with torch.no_grad():
                z = stack(pool)
            gaps = kd_loss(z, [("logits", told)], kind="fkl", outputs=("kd",))[1]["kd"].scatter(1, taken, -torch.inf)
            new = [select(one, ADD, arm, generator=draw) for one in gaps]  # type: ignore[arg-type]
            taken = torch.cat((taken, torch.stack(new)), 1)
        train(stack, loss, range(50), Recipe(STEPS, rate, clip=None, schedule="linear"))
    with torch.no_grad():
        right = (stack(held).argmax(-1) == y).double().mean(1)
    return {seed: 100 * value for seed, value in zip(seeds, right.tolist(), strict=True)}


def choices() -> dict[str, Choice]:
    return best_rates(table, ARMS, RATES)


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return at_best_rates(table, ARMS, chosen, seed, SEEDS)
