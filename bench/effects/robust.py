"""Small networks on digits, those of all seeds and rates trained and attacked at once (`w2s_fast.attacks.Stacked`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2s_fast.attacks import PGD, Stacked
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.adversarial import at_loss, train_by
from w2s_fast.methods.adversarial.evaluation import right, survives

from . import protocol
from .data import digits

#: ``table(arm, rate, seeds, on)``: percent right of every seed, all trained at once.
Table = Callable[[str, float, tuple[int, ...], str], Mapping[int, float]]
TRAIN, BATCH, MOMENTUM, DECAY = 900, 64, 0.9, 5e-4


class Parts(NamedTuple):
    """Of S seeds: training pictures ``[S, N, 64]`` with labels, and those that are held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


def parts(seeds: Sequence[int], on: str, count: int = TRAIN) -> Parts:
    """The first ``count`` training digits of every seed, and its dev or test part."""
    found = [digits(seed) for seed in seeds]
    rows = [(d["train"].x[:count], d["train"].y[:count], d[on].x, d[on].y) for d in found]
    return Parts(*(torch.stack(part) for part in zip(*rows, strict=True)))


def group(seed: int, seeds: Sequence[int] = protocol.SEEDS) -> tuple[int, ...]:
    """The seeds that are trained together with one: those of the verdict, or it alone."""
    return tuple(seeds) if seed in seeds else (seed,)


def best_rates(table: Table, arms: Sequence[str], rates: Sequence[float]) -> dict[str, protocol.Choice]:
    """The rate of every arm that gets most right on dev."""
    dev = protocol.DEV_SEEDS
    return {arm: protocol.choose(lambda rate, seed, on, arm=arm: table(arm, rate, dev, on)[seed], {"rate": rates})
            for arm in arms}  # fmt: skip


def at_best_rates(
    table: Table, arms: Sequence[str], chosen: Mapping[str, Any], seed: int, seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Percent right of every arm on test, at the rate that was chosen for it."""
    together = group(seed, seeds)
    return {arm: {"right": table(arm, chosen[arm]["rate"], together, "test")[seed]} for arm in arms}


def mlp(*widths: int, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them, He's initialisation, biases 0."""
    draw, layers = torch.Generator().manual_seed(777 + seed), list[nn.Module]()
    for i, (inner, outer) in enumerate(pairwise(widths)):
        layer = nn.Linear(inner, outer)
        gain = 1.0 if i == len(widths) - 2 else 2.0
        with torch.no_grad():
            layer.weight.copy_(math.sqrt(gain / inner) * torch.randn(outer, inner, generator=draw))
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Batches:
    """Batches ``(x, y)`` ``[S, B, *]``, with more tensors of the samples where given; an order of its own a seed."""

    def __init__(self, x: Tensor, y: Tensor, orders: Sequence[int], *more: Tensor, size: int = BATCH) -> None:
        self.tensors, self.size = (x, y, *more), size
        self.draws = [torch.Generator().manual_seed(50_000 + seed) for seed in orders]

    def __len__(self) -> int:
        return self.tensors[0].shape[1] // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.stack([torch.randperm(self.tensors[0].shape[1], generator=draw) for draw in self.draws])
        row = torch.arange(len(order))[:, None]
        for at in range(len(self)):
            index = order[:, at * self.size : (at + 1) * self.size]
            yield tuple(t[row, index] for t in self.tensors)


class StackedSGD(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, a rate for each of the stacked models, weight decay on matrices."""

    def __init__(self, parameters: Any, rates: Tensor, momentum: float = MOMENTUM, decay: float = DECAY) -> None:
        super().__init__(list(parameters), {"lr": 1.0})
        self.rates, self.momentum, self.decay = rates, momentum, decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad if p.ndim < 3 else p.grad + self.decay * p
                rate = group["lr"] * self.rates.view(-1, *[1] * (p.ndim - 1))
                if self.momentum:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(self.momentum).add_(g)
                    g = g + self.momentum * v
                p.sub_(rate * g)


def clean(model: Any, x: Tensor, y: Any, share: float) -> Tensor:
    """The maker that leaves x as it is."""
    return x


def fit(
    models: Sequence[nn.Module] | Stacked, data: Any, rates: Sequence[float], steps: int, *,
    loss: Callable[..., Tensor] = at_loss, make: Callable[..., Tensor] = clean, seed: int = 0,
    schedule: Any = "cosine", ramp: float = 0.0, momentum: float = MOMENTUM, decay: float = DECAY,
) -> Stacked:  # fmt: skip
    """Train models with a rate each; frozen in evaluation mode. ``seed``: of random starts."""
    stack = models if isinstance(models, Stacked) else Stacked(list(models))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(30_000 + seed)
        recipe = Recipe(steps, 1.0, clip=None, schedule=schedule, seed=seed,
                        optimizer=lambda p, _: StackedSGD(p, torch.tensor(list(rates)), momentum, decay))  # fmt: skip
        train_by(stack, data, loss, recipe, make=make, ramp=ramp)
    return stack.eval().requires_grad_(False)


def spread(seeds: Sequence[int], values: Sequence[Any]) -> list[tuple[int, Any]]:
    """(seed, value) of a stack: all values of the first seed, then of the next."""
    return [(seed, value) for seed in seeds for value in values]


def masks(stack: Any, x: Tensor, y: Tensor, eps: float, *, steps: int = 20, restarts: int = 2) -> tuple[Tensor, Tensor]:
    """Which pictures ``[S, N]`` are right, and right under PGD with steps of eps / 8 and restarts too."""
    attack = PGD(stack, eps, alpha=eps / 8, steps=steps, restarts=restarts,
                 generator=torch.Generator().manual_seed(10_000))  # fmt: skip
    ok = right(stack, x, y)
    return ok, survives(stack, x, y, attack, ok)


def percent(mask: Tensor) -> list[float]:
    """Of the last dimension."""
    found: list[float] = (100 * mask.double().mean(-1)).tolist()
    return found
