"""B-MTARD (arXiv 2306.16170): a small student with few labels learns from a clean and a robust teacher, in balance.

Teachers: MLP 64-256-256-10 on 900 digits, and 64-128-128-10 trained with PGD-10 on them. Student: MLP 64-64-64-10 that
sees 100 of them, 400 steps, radius 0.15, raised over the first 100 steps in every arm. Mean of the percent right as
they are and under PGD-20 with 2 restarts. Against PGD training, half of it clean, the robust teacher for both inputs,
both teachers with fixed weights, and MTARD (balanced losses, no temperatures). The rate of every arm is chosen on dev.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.attacks import Stacked, outputs
from w2s_fast.methods.adversarial import at_loss, half_loss, pgd_maker
from w2s_fast.methods.adversarial.mtard import Balance, distillation

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, fit, group, masks, mlp, parts, percent, spread

EPS, STEPS, FEW, SCALE, RATES = 0.15, 400, 100, 10.0, (0.03, 0.06, 0.1, 0.2, 0.3)
ARMS = ("PGD", "half clean", "one teacher", "fixed weights", "MTARD", "B-MTARD")
FULL = {"RATES": (0.015, 0.03, 0.06, 0.1, 0.2, 0.3)}
CLAIMS = [
    Claim("B-MTARD beats PGD training by 1.2 points", "mean", "B-MTARD", "PGD", 1.2),
    Claim("also in clean accuracy, by 1 point", "right", "B-MTARD", "PGD", 1.0),
    Claim("it beats both teachers with fixed weights by 0.4 points", "mean", "B-MTARD", "fixed weights", 0.4),
    Claim("it is at most 1 point worse than the robust teacher alone", "mean", "B-MTARD", "one teacher", -1.0),
]


@lru_cache(maxsize=4)
def teachers(seeds: tuple[int, ...], on: str) -> tuple[list[Any], list[Any]]:
    """A clean and a robust one of each seed."""
    data = parts(seeds, on)
    clean = fit([mlp(64, 256, 256, 10, seed=9000 + s) for s in seeds], Batches(data.x, data.y, seeds),
                [0.1] * len(seeds), 500)  # fmt: skip
    robust = fit([mlp(64, 128, 128, 10, seed=9500 + s) for s in seeds], Batches(data.x, data.y, seeds),
                 [0.1] * len(seeds), 400, make=pgd_maker(EPS, steps=10), ramp=0.25)  # fmt: skip
    return clean.models(), robust.models()


def student_loss(arm: str, count: int, told: tuple[Any, Any]) -> Any:
    balance, step = Balance((count,), heat=1e-3 if arm == "B-MTARD" else 0.0, late=0.87), 0

    def loss(model: Any, x: Tensor, x_adv: Tensor, y: Any) -> Tensor:
        nonlocal step
        with torch.no_grad():
            robust, clean = outputs(told[1], x_adv), outputs(told[1 if arm == "one teacher" else 0], x)
        adv, heat_adv = distillation(outputs(model, x_adv), robust, balance.state["tau_adv"])
        nat, heat_nat = distillation(outputs(model, x), clean, balance.state["tau_nat"])
        weight: Any = 0.5
        if "MTARD" in arm:
            weight = balance.update(adv, nat, heat_adv, heat_nat, step / STEPS)
        step += 1
        return SCALE * (weight * adv + (1 - weight) * nat).sum()

    return loss


@lru_cache(maxsize=64)
def table(arm: str, rates: tuple[float, ...], seeds: tuple[int, ...], on: str) -> dict[tuple[int, float], Any]:
    each = spread(seeds, rates)
    own = [seed for seed, _ in each]
    data, found = parts(own, on), teachers(seeds, on)
    told = tuple(Stacked([m for m in kind for _ in rates]).requires_grad_(False) for kind in found)
    loss = {"PGD": at_loss, "half clean": half_loss}.get(arm) or student_loss(arm, len(own), told)  # type: ignore[arg-type]
    stack = fit([mlp(64, 64, 64, 10, seed=s) for s in own],
                Batches(data.x[:, :FEW], data.y[:, :FEW], [1000 + s for s in own]), [r for _, r in each], STEPS,
                loss=loss, make=pgd_maker(EPS, steps=10, start="gauss"), ramp=0.25)  # fmt: skip
    rows = zip(*map(percent, masks(stack, data.held_x, data.held_y, EPS)), strict=True)
    return {key: {"right": a, "robust": b, "mean": (a + b) / 2} for key, (a, b) in zip(each, rows, strict=True)}


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, seed: int, on: str) -> float:
        return float(table(arm, RATES, DEV_SEEDS, on)[seed, rate]["mean"])

    return {arm: choose(lambda rate, seed, on, arm=arm: value(arm, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: table(arm, (chosen[arm]["rate"],), group(seed), "test")[seed, chosen[arm]["rate"]] for arm in ARMS}
