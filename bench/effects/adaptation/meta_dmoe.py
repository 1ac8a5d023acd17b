"""Meta-DMoE (arXiv 2210.03885): domains that differ in where the classes part, found from inputs alone.

A domain is ``x = z + mu w``, z normal in 8 dimensions, y = 1 if z . w > 0, mu normal with deviation 2: x alone does
not tell y, the domain's mean does. 24 source domains for six experts, 20 others of which 24 inputs without labels are
given. Accuracy there: plain training on all source data, the meta-trained student before its step, and after it. The
step's rate is chosen on dev domains.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.adaptation.meta_dmoe import MetaDmoe

from ..data import mlp
from ..protocol import Choice, Claim, choose

SOURCES, EXPERTS, TARGETS, SUPPORT, QUERY, META = 24, 6, 20, 24, 64, 800
RATES = (0.1, 0.5, 2.0)
CLAIMS = [
    Claim("the step adds 12 points to the meta-trained student", "accuracy", "after", "before", 0.12),
    Claim("it beats plain training by 12 points", "accuracy", "after", "plain", 0.12),
]


class World:
    """The direction and the domains of a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        w = torch.randn(8, generator=self.draw)
        self.w = w / w.norm()
        self.sources = 2 * torch.randn(SOURCES, generator=self.draw)
        self.targets = {on: 2 * torch.randn(TARGETS, generator=self.draw) for on in ("dev", "test")}

    def batch(self, mu: Tensor, count: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(count, 8, generator=self.draw)
        return z + mu * self.w, (z @ self.w > 0).long()


def student(seed: int) -> nn.Module:
    return nn.Sequential(mlp(8, 32, 16, seed=seed), nn.ReLU(), nn.Linear(16, 2))


def plainly(world: World, model: nn.Module, domains: Tensor, steps: int) -> nn.Module:
    """Cross-entropy on batches of these domains."""

    def loss(model: nn.Module, _: int) -> Tensor:
        parts = [world.batch(mu, 16) for mu in domains]
        return cross_entropy(model(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts]))

    train(model, loss, range(steps), Recipe(steps, 3e-3, clip=None))
    return model


@lru_cache(maxsize=4)
def begun(seed: int) -> tuple[World, list[nn.Module], nn.Module]:
    """Experts and the student after plain training."""
    world = World(seed)
    groups = world.sources.view(EXPERTS, -1)
    torch.manual_seed(seed)
    experts = [plainly(world, student(100 + i), group, 200) for i, group in enumerate(groups)]
    return world, experts, plainly(world, student(seed), world.sources, 300)


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


def run(rate: float, seed: int, on: str) -> dict[str, dict[str, float]]:
    import copy

    world, experts, plain = begun(seed)
    world.draw.manual_seed(7000 + seed)
    both = MetaDmoe(copy.deepcopy(plain), copy.deepcopy(experts), rate=rate, heads=4, dropout=0.0, seed=seed)
    both.fit_aggregator(lambda _: world.batch(world.sources[int(torch.randint(SOURCES, (1,), generator=world.draw))],
                                              64), 2, Recipe(100, 1e-3))  # fmt: skip

    def draw(_: int) -> tuple[Tensor, Tensor, Tensor, int]:
        domain = int(torch.randint(SOURCES, (1,), generator=world.draw))
        s, _y = world.batch(world.sources[domain], SUPPORT)
        q, y = world.batch(world.sources[domain], QUERY)
        return s, q, y, domain // (SOURCES // EXPERTS)

    both.fit(draw, Recipe(META, 2e-3, clip=5.0, seed=seed), aggregator_rate=6e-4)
    found: dict[str, list[float]] = {"plain": [], "before": [], "after": []}
    world.draw.manual_seed(9000 + seed)
    for mu in world.targets[on]:
        x, y = world.batch(mu, 400)
        for arm, model in (("plain", plain), ("before", both), ("after", both.adapted(x[:SUPPORT]))):
            found[arm].append(right(model, x, y))
    return {arm: {"accuracy": sum(values) / TARGETS} for arm, values in found.items()}


def choices() -> dict[str, Choice]:
    return {"step": choose(lambda rate, seed, on: run(rate, seed, on)["after"]["accuracy"], {"rate": RATES})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return run(chosen["step"]["rate"], seed, "test")
