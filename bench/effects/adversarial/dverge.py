"""DVERGE (arXiv 2009.14720): an ensemble whose members are not fooled by the same inputs.

Three MLP 64-96-96-10, 400 natural steps each; then 300 steps of DVERGE, or of uniform noise of the same size, or none.
Percent right of the ensemble (mean of probabilities) as it is; under the worse of PGD-20 and momentum PGD-20 on a
held-out ensemble, radius 0.15; under PGD-20 on itself, radius 0.1; and how many of the members are fooled by PGD on
another member, radius 0.1. Adversarial training of each member (radius 0.1, its rate not chosen) for comparison. Rate
and radius of the distillation are chosen on dev, by the transfer.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.attacks import PGD, Stacked, outputs
from w2s_fast.methods.adversarial import pgd_maker
from w2s_fast.methods.adversarial._robust import cross_entropy
from w2s_fast.methods.adversarial.dverge import distilled, others
from w2s_fast.methods.adversarial.evaluation import right

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, fit, group, mlp, parts

MEMBERS, STEPS, RADII, RATES = 3, 300, (0.1, 0.2, 0.3), (0.03, 0.1)
ARMS = ("DVERGE", "noise")
FULL = {"RADII": (0.1, 0.15, 0.2, 0.3), "RATES": (0.01, 0.03, 0.1)}
CLAIMS = [
    Claim("DVERGE is 20 points better than the plain ensemble under transfer", "transfer", "DVERGE", "plain", 20.0),
    Claim("its members are fooled at most half as often by another's examples", "crossed", "DVERGE", "half of plain",
          0.0, "lower"),
    Claim("its clean accuracy is at most 1 point lower", "right", "DVERGE", "plain", -1.0),
]  # fmt: skip


class Ensembles(nn.Module):
    """Log of the mean probabilities of every group of a stack of members: x ``[S, N, *]`` to ``[S, N, C]``."""

    sample_dims = 2

    def __init__(self, stack: Stacked) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        z = self.stack(x.repeat_interleave(MEMBERS, 0)).log_softmax(-1)
        return z.unflatten(0, (-1, MEMBERS)).logsumexp(1)


def layer(at: int, model: Any, x: Tensor) -> Tensor:
    """Before the ReLU ``at``, of all members."""
    found: Tensor = model.call(lambda base, part: base[: 2 * at + 1](part), x)
    return found


@lru_cache(maxsize=8)
def natural(seeds: tuple[int, ...], on: str, first: int) -> Stacked:
    """Members with initialisations from ``first`` on."""
    own = [seed for seed in seeds for _ in range(MEMBERS)]
    data = parts(own, on)
    models = [mlp(64, 96, 96, 10, seed=first + 10 * seed + i % MEMBERS) for i, seed in enumerate(own)]
    return fit(models, Batches(data.x, data.y, [first + i for i in range(len(own))]), [0.1] * len(own), 400)


def trained(arm: str, eps: float, rate: float, seeds: tuple[int, ...], on: str) -> Stacked:
    own = [seed for seed in seeds for _ in range(MEMBERS)]
    start, data = natural(seeds, on, 0), parts(own, on)
    stack = Stacked(start.models()).requires_grad_(True)
    draw = torch.Generator().manual_seed(seeds[0])
    step, at = 0, 0

    def make(model: Any, x: Tensor, y: Any, share: float) -> Tensor:
        nonlocal step, at
        if arm == "adversarial":
            return pgd_maker(0.1, steps=10)(model, x, y, share)
        if arm == "noise":
            return (x + eps * (2 * torch.rand(x.shape, generator=draw) - 1)).clamp(0, 1)
        if step % 14 == 0:
            at = int(torch.randint(2, (), generator=draw))
        step += 1
        index = torch.randint(data.x.shape[1], (len(seeds), x.shape[1]), generator=draw).repeat_interleave(MEMBERS, 0)
        target = data.x[torch.arange(len(own))[:, None], index]
        return others(distilled(model, partial(layer, at), x, target, eps), MEMBERS)

    def loss(model: Any, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        times = x_adv.shape[1] // y.shape[1]
        return times * cross_entropy(outputs(model, x_adv), y.repeat(1, times))

    order = [2000 + seed for seed in own]
    return fit(stack, Batches(data.x, data.y, order), [rate] * len(own), STEPS, make=make, loss=loss, seed=seeds[0])


@lru_cache(maxsize=64)
def table(arm: str, eps: float, rate: float, seeds: tuple[int, ...], on: str) -> dict[int, dict[str, float]]:
    stack = natural(seeds, on, 0) if arm == "plain" else trained(arm, eps, rate, seeds, on)
    whole, held, data = Ensembles(stack), Ensembles(natural(seeds, on, 5000)), parts(seeds, on)
    x, y = data.held_x, data.held_y

    def draw(seed: int) -> dict[str, Any]:
        return {"steps": 20, "generator": torch.Generator().manual_seed(seed)}

    ok = right(whole, x, y)
    moved = [PGD(held, 0.15, momentum=mu, **draw(1))(x, y) for mu in (0.0, 1.0)]
    transfer = ok & right(whole, moved[0], y) & right(whole, moved[1], y)
    own = ok & right(whole, PGD(whole, 0.1, restarts=2, **draw(2))(x, y), y)
    every, labels = x.repeat_interleave(MEMBERS, 0), y.repeat_interleave(MEMBERS, 0)
    crossed = others(PGD(stack, 0.1, **draw(3))(every, labels), MEMBERS)
    fooled = ~right(stack, crossed, labels.repeat(1, MEMBERS - 1))
    rows = (ok, transfer, own, fooled.unflatten(0, (-1, MEMBERS)).flatten(1))
    values = [(100 * row.double().mean(1)).tolist() for row in rows]
    names = ("right", "transfer", "white-box", "crossed")
    each = zip(*values, strict=True)
    return {seed: dict(zip(names, row, strict=True)) for seed, row in zip(seeds, each, strict=True)}


def choices() -> dict[str, Choice]:
    def value(arm: str, eps: float, rate: float, seed: int, on: str) -> float:
        return table(arm, eps, rate, DEV_SEEDS, on)[seed]["transfer"]

    return {arm: choose(lambda eps, rate, seed, on, arm=arm: value(arm, eps, rate, seed, on),
                        {"eps": RADII, "rate": RATES}) for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    seeds = group(seed)
    found = {arm: table(arm, chosen[arm]["eps"], chosen[arm]["rate"], seeds, "test")[seed] for arm in ARMS}
    found["plain"] = table("plain", 0.0, 0.0, seeds, "test")[seed]
    found["adversarial"] = table("adversarial", 0.1, 0.1, seeds, "test")[seed]
    found["half of plain"] = {"crossed": found["plain"]["crossed"] / 2}
    return found
