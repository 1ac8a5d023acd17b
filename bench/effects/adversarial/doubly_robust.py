"""Doubly robust reweighting (arXiv 2308.00311): the samples with the largest adversarial losses, weighed up.

MLP 64-32-32-10 on 900 digits, radius 0.15, PGD-10, 300 steps: so narrow that the training loss stays high. Equal
weights for 100 steps, then softmax(l / r) in the batch; against equal weights throughout. Mean adversarial loss of the
training digits and of the tenth with the largest; percent right under PGD-20, all and the worst three classes. Rate and
r are chosen on dev by the loss of the largest tenth, the rate of the baseline too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from w2s_fast.attacks import PGD, outputs
from w2s_fast.methods.adversarial import at_loss, pgd_maker
from w2s_fast.methods.adversarial._robust import cross_entropy
from w2s_fast.methods.adversarial.doubly_robust import weights

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, fit, group, mlp, parts, spread
from ._unequal import by_class

EPS, STEPS, WARM, RATES, SHARPNESS, SEEDS = 0.15, 300, 100, (0.05, 0.1, 0.2), (1.0, 2.0, 4.0), tuple(range(10))
ARMS = ("equal", "weighed")
FULL = {"RATES": (0.025, 0.05, 0.1, 0.2)}
CLAIMS = [
    Claim("the largest tenth of the training losses falls by 0.4", "largest tenth", "weighed", "equal", 0.4, "lower"),
    Claim("the mean loss rises by at most 0.15", "mean loss", "weighed", "equal", -0.15, "lower"),
    Claim("the worst three classes lose at most 1 point", "worst three", "weighed", "equal", -1.0),
    Claim("the worst three classes gain", "worst three", "weighed", "equal"),
]


@lru_cache(maxsize=64)
def table(arm: str, grid: tuple[Any, ...], seeds: tuple[int, ...], on: str) -> dict[tuple[int, Any], Any]:
    each = spread(seeds, grid)
    own = [seed for seed, _ in each]
    data, step = parts(own, on), 0
    sharp = torch.tensor([r for _, (_, r) in each])[:, None]

    def loss(model: Any, x: Any, x_adv: Any, y: Any) -> Any:
        nonlocal step
        losses, step = at_loss(model, x, x_adv, y), step + 1
        # of losses over r each, r = 1: the weights of every r at once
        return losses if arm == "equal" or step <= WARM else weights(losses / sharp, 1.0) * losses

    stack = fit([mlp(64, 32, 32, 10, seed=s) for s in own], Batches(data.x, data.y, [1000 + s for s in own]),
                [rate for _, (rate, _) in each], STEPS, loss=loss, make=pgd_maker(EPS, steps=10))  # fmt: skip
    moved = PGD(stack, EPS, generator=torch.Generator().manual_seed(6))(data.x, data.y)
    with torch.no_grad():
        losses = cross_entropy(outputs(stack, moved), data.y)
    tenth = losses.topk(losses.shape[1] // 10, 1).values.mean(1).tolist()
    rows = by_class(stack, data.held_x, data.held_y, EPS)
    return {
        key: {"largest tenth": top, "mean loss": mean, **row}
        for key, top, mean, row in zip(each, tenth, losses.mean(1).tolist(), rows, strict=True)
    }


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, r: float, seed: int, on: str) -> float:
        grid = tuple((a, b) for a in RATES for b in (SHARPNESS if arm == "weighed" else (0.0,)))
        return float(table(arm, grid, DEV_SEEDS, on)[seed, (rate, r)]["largest tenth"])

    return {
        arm: choose(lambda rate, r, seed, on, arm=arm: value(arm, rate, r, seed, on),
                    {"rate": RATES, "r": SHARPNESS if arm == "weighed" else (0.0,)}, better="lower")
        for arm in ARMS
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for arm in ARMS:
        setting = (chosen[arm]["rate"], chosen[arm]["r"])
        found[arm] = table(arm, (setting,), group(seed, SEEDS), "test")[seed, setting]
    return found
