"""SRAT (arXiv 2107.13639): class weights and separated features help the small classes in adversarial training.

MLP 64-96-96-10 on 323 digits, 80 of the largest class to 8 of the smallest, PGD-10 of radius 0.1, 300 steps. Percent
right under PGD-20 with 2 restarts: all, the mean of the worst three classes, the worst. Plain adversarial training,
class weights, class weights with the separation loss, and that loss alone. Rate, and weight of the separation, are
chosen on dev by the worst three.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch

from w2s_fast.methods.adversarial import pgd_maker
from w2s_fast.methods.adversarial.srat import class_weights, srat_loss

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, fit, group, mlp, spread
from ._unequal import by_class, unequal

EPS, STEPS, BETA, RATES, WEIGHTS, SEEDS = 0.1, 300, 0.99, (0.05, 0.1, 0.2), (0.3, 1.0, 3.0), tuple(range(10))
#: Class weights, separation.
ARMS = {"plain": (False, False), "weights": (True, False), "weights, separation": (True, True),
        "separation": (False, True)}  # fmt: skip
FULL = {"RATES": (0.03, 0.05, 0.1, 0.2)}
CLAIMS = [
    Claim("class weights raise the worst three classes by 4 points", "worst three", "weights", "plain", 4.0),
    Claim("with the separation too", "worst three", "weights, separation", "plain", 4.0),
    Claim("the worst class by 3 points", "worst class", "weights", "plain", 3.0),
    Claim("all classes by 1 point", "robust", "weights", "plain", 1.0),
    Claim("clean accuracy is at most half a point lower", "right", "weights", "plain", -0.5),
    Claim("the separation adds to the weights", "worst three", "weights, separation", "weights"),
]


@lru_cache(maxsize=64)
def table(arm: str, grid: tuple[Any, ...], seeds: tuple[int, ...], on: str) -> dict[tuple[int, Any], Any]:
    each = spread(seeds, grid)
    own = [seed for seed, _ in each]
    data, weighted = unequal(own, on), ARMS[arm][0]
    weights = class_weights(data.counts, BETA) if weighted else torch.ones_like(data.counts)
    separate = torch.tensor([weight for _, (_, weight) in each])[:, None]

    loss = partial(srat_loss, weights=weights, temperature=0.1, separate=separate if ARMS[arm][1] else 0.0)
    stack = fit([mlp(64, 96, 96, 10, seed=s) for s in own],
                Batches(data.parts.x, data.parts.y, [1000 + s for s in own]), [rate for _, (rate, _) in each], STEPS,
                loss=loss, make=pgd_maker(EPS, steps=10))  # fmt: skip
    return dict(zip(each, by_class(stack, data.parts.held_x, data.parts.held_y, EPS), strict=True))


def settings(arm: str) -> tuple[Any, ...]:
    return tuple((rate, weight) for rate in RATES for weight in (WEIGHTS if ARMS[arm][1] else (0.0,)))


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, weight: float, seed: int, on: str) -> float:
        return float(table(arm, settings(arm), DEV_SEEDS, on)[seed, (rate, weight)]["worst three"])

    return {
        arm: choose(lambda rate, weight, seed, on, arm=arm: value(arm, rate, weight, seed, on),
                    {"rate": RATES, "weight": WEIGHTS if both[1] else (0.0,)})
        for arm, both in ARMS.items()
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for arm in ARMS:
        setting = (chosen[arm]["rate"], chosen[arm]["weight"])
        found[arm] = table(arm, (setting,), group(seed, SEEDS), "test")[seed, setting]
    return found
