"""Adversarial fine-tuning (arXiv 2012.13628): robust in a few epochs, by a slow start and a fast decay of the rate.

MLP 64-96-96-10 on 900 digits, radius 0.1, PGD-10. Natural training of 200 steps, then 60 adversarial ones (4.3 epochs)
with the schedule, with a constant rate (the best one, and the schedule's peak), with a cosine; against adversarial
training from scratch of 60 steps, of 78 (the gradients of 200 natural and 60 adversarial steps) and of 400. Percent
right under PGD-20 with 2 restarts. The rate of every arm is chosen on dev.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from w2s_fast.methods.adversarial import pgd_maker
from w2s_fast.methods.adversarial.adversarial_finetuning import SlowFast

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, fit, group, masks, mlp, parts, percent, spread

EPS, NATURAL, RATE, SEEDS = 0.1, 200, 0.1, tuple(range(10))
RATES: tuple[float, ...] = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
#: Natural training before, schedule, adversarial steps.
ARMS: dict[str, tuple[bool, Any, int]] = {
    "slow-fast": (True, SlowFast(), 60), "constant": (True, "constant", 60), "cosine": (True, "cosine", 60),
    "scratch 60": (False, "cosine", 60), "scratch 78": (False, "cosine", 78), "scratch 400": (False, "cosine", 400),
}  # fmt: skip
FULL = {"RATES": (0.0125, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)}
CLAIMS = [
    Claim("60 steps from a trained network beat 60 from scratch by 2.5 points", "robust", "slow-fast", "scratch 60",
          2.5),
    Claim("at equal total cost they beat training from scratch by 1 point", "robust", "slow-fast", "scratch 78", 1.0),
    Claim("the schedule beats a constant rate as high as its peak by 15 points", "robust", "slow-fast",
          "constant at the peak", 15.0),
    Claim("it is at most half a point worse than the best constant rate", "robust", "slow-fast", "constant", -0.5),
]  # fmt: skip


@lru_cache(maxsize=64)
def table(arm: str, rates: tuple[float, ...], seeds: tuple[int, ...], on: str) -> dict[tuple[int, float], Any]:
    """(percent right, percent robust) by seed and rate."""
    before, schedule, steps = ARMS[arm]
    each = spread(seeds, rates)
    own = [seed for seed, _ in each]
    data = parts(own, on)
    stack: Any = [mlp(64, 96, 96, 10, seed=seed) for seed in own]
    if before:
        stack = fit(stack, Batches(data.x, data.y, own), [RATE] * len(each), NATURAL).requires_grad_(True)
    order = [1000 + seed for seed in own]
    stack = fit(stack, Batches(data.x, data.y, order), [rate for _, rate in each], steps, make=pgd_maker(EPS, steps=10),
                schedule=schedule)  # fmt: skip
    found = zip(*map(percent, masks(stack, data.held_x, data.held_y, EPS)), strict=True)
    return dict(zip(each, found, strict=True))


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: table(arm, RATES, DEV_SEEDS, on)[seed, rate][1], {"rate": RATES})
        for arm in ARMS
    }


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    arms = {arm: (arm, chosen[arm]["rate"]) for arm in ARMS}
    arms["constant at the peak"] = ("constant", chosen["slow-fast"]["rate"])
    found = {name: table(arm, (rate,), group(seed, SEEDS), "test")[seed, rate] for name, (arm, rate) in arms.items()}
    return {name: {"right": values[0], "robust": values[1]} for name, values in found.items()}
