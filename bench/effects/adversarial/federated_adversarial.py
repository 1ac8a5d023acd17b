"""Federated adversarial learning (arXiv 2208.03635): clients that attack their own copies make a robust global model.

Five clients of 100 digits with a Dirichlet(0.5) split of the labels, two-layer ReLU networks 64-h-10, SGD without
momentum, batch 32, PGD-7 of radius 0.1, K = 5 local steps, 60 rounds, mean of the differences. Percent right under
PGD-20 with 2 restarts, and the adversarial loss on the clients' data over the rounds and for widths h; against
federated training without attacks, every client alone, and all data in one place. The rate is chosen on dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2s_fast.attacks import PGD, Stacked, outputs
from w2s_fast.methods.adversarial._robust import cross_entropy, total
from w2s_fast.methods.adversarial.federated_adversarial import server_update

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Parts, group, masks, mlp, parts, percent, spread

EPS, CLIENTS, EACH, LOCAL, ROUNDS, BATCH, RATES = 0.1, 5, 100, 5, 60, 32, (0.5, 1.0, 2.0, 3.0)
ARMS, WIDTHS = ("FAL", "FedAvg", "alone", "central"), (8, 32, 128)
FULL = {"RATES": (0.25, 0.5, 1.0, 2.0, 3.0), "WIDTHS": (8, 32, 128, 512)}
CLAIMS = [
    Claim("FAL is 10 points more robust than federated training", "robust", "FAL", "FedAvg", 10.0),
    Claim("15 points more than clients alone", "robust", "FAL", "alone", 15.0),
    Claim("at most 5 points less than all data in one place", "robust", "FAL", "central", -5.0),
    Claim("its adversarial loss ends at 0.35 of the first at most", "share of loss", "FAL", 0.35, 0.0, "lower"),
    Claim("width 128 ends lower than width 32", "last loss", "FAL", "width 32", 0.0, "lower"),
    Claim("width 32 ends lower than width 8", "last loss", "width 32", "width 8", 0.0, "lower"),
]


def split(y: Tensor, seed: int) -> Tensor:
    """Indices ``[clients, each]``: labels of every client by its own Dirichlet shares, without replacement."""
    draw = np.random.default_rng(6000 + seed)
    pools = [list(draw.permutation(np.flatnonzero(y.numpy() == label))) for label in range(10)]
    rows = []
    for _ in range(CLIENTS):
        share, own = draw.dirichlet([0.5] * 10), list[int]()
        while len(own) < EACH:
            left = np.array([len(pool) for pool in pools])
            p = share * (left > 0)
            own.append(int(pools[draw.choice(10, p=p / p.sum() if p.sum() > 0 else left / left.sum())].pop()))
        rows.append(own)
    return torch.tensor(rows)


def clients(seeds: Sequence[int], on: str) -> Parts:
    """Training digits of every client of every seed ``[S clients, each, 64]``, and the held-out ones of the seeds."""
    whole = parts(seeds, on)
    index = torch.stack([split(y, seed) for y, seed in zip(whole.y, seeds, strict=True)])
    row = torch.arange(len(seeds))[:, None, None]
    return Parts(whole.x[row, index].flatten(0, 1), whole.y[row, index].flatten(0, 1), whole.held_x, whole.held_y)


def steps(stack: Stacked, x: Tensor, y: Tensor, rates: Tensor, count: int, size: int, draw: torch.Generator, *,
          attacked: bool = True) -> None:  # fmt: skip
    """SGD of every model on its own data, in place."""
    row = torch.arange(len(x))[:, None]
    for _ in range(count):
        index = torch.randint(x.shape[1], (len(x), size), generator=draw)
        bx, by = x[row, index], y[row, index]
        bx = PGD(stack, EPS, steps=7, generator=draw)(bx, by) if attacked else bx
        total(cross_entropy(outputs(stack, bx), by)).backward()
        with torch.no_grad():
            for p in stack.parameters():
                p -= rates.view(-1, *[1] * (p.ndim - 1)) * p.grad
                p.grad = None


def repeated(stack: Stacked, times: int) -> Stacked:
    return Stacked([model for model in stack.models() for _ in range(times)])


def adversarial_loss(stack: Stacked, x: Tensor, y: Tensor) -> Tensor:
    """Of every model's seed, the mean over its clients' data."""
    many = repeated(stack, CLIENTS)
    moved = PGD(many, EPS, generator=torch.Generator().manual_seed(9))(x, y)
    with torch.no_grad():
        return cross_entropy(outputs(many, moved), y).view(stack.count, -1).mean(1)


def federated(stack: Stacked, x: Tensor, y: Tensor, rates: Tensor, draw: torch.Generator, attacked: bool) -> Any:
    """Rounds of local steps and the mean of the differences; first and last adversarial loss."""
    losses = []
    for turn in range(ROUNDS):
        local = repeated(stack, CLIENTS)
        steps(local, x, y, rates.repeat_interleave(CLIENTS), LOCAL, BATCH, draw, attacked=attacked)
        mean = {name: p.detach().unflatten(0, (-1, CLIENTS)).mean(1) for name, p in local.named_parameters()}
        stack.load_state_dict(server_update(stack.state_dict(), mean))
        if turn in (0, ROUNDS - 1):
            losses.append(adversarial_loss(stack, x, y))
    return losses


@lru_cache(maxsize=64)
def table(arm: str, width: int, rates: tuple[float, ...], seeds: tuple[int, ...], on: str) -> dict[Any, Any]:
    each = spread(seeds, rates)
    own, draw = [seed for seed, _ in each], torch.Generator().manual_seed(seeds[0])
    data, rate = clients(own, on), torch.tensor([r for _, r in each]) / LOCAL
    stack, first_last = Stacked([mlp(64, width, 10, seed=400 + s) for s in own]), None
    if arm in ("FAL", "FedAvg"):
        first_last = federated(stack, data.x, data.y, rate, draw, arm == "FAL")
    elif arm == "alone":
        stack = repeated(stack, CLIENTS)
        steps(stack, data.x, data.y, rate.repeat_interleave(CLIENTS), ROUNDS * LOCAL, BATCH, draw)
    else:
        x, y = data.x.unflatten(0, (-1, CLIENTS)).flatten(1, 2), data.y.unflatten(0, (-1, CLIENTS)).flatten(1, 2)
        steps(stack, x, y, rate, ROUNDS * LOCAL, BATCH * CLIENTS, draw)
    times = stack.count // len(own)
    found = masks(stack, *(t.repeat_interleave(times, 0) for t in (data.held_x, data.held_y)), EPS)
    right, robust = (torch.tensor(percent(mask)).view(len(own), times).mean(1).tolist() for mask in found)
    rows = [{"right": a, "robust": b} for a, b in zip(right, robust, strict=True)]
    if first_last is not None:
        for i, row in enumerate(rows):
            row |= {"last loss": float(first_last[1][i]), "share of loss": float(first_last[1][i] / first_last[0][i])}
    return dict(zip(each, rows, strict=True))


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: table(arm, 128, RATES, DEV_SEEDS, on)[seed, rate]["robust"],
                    {"rate": RATES})
        for arm in ARMS
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    rates, seeds = {arm: chosen[arm]["rate"] for arm in ARMS}, group(seed)
    found = {arm: table(arm, 128, (rates[arm],), seeds, "test")[seed, rates[arm]] for arm in ARMS}
    widths = {f"width {w}": table("FAL", w, (rates["FAL"],), seeds, "test")[seed, rates["FAL"]] for w in WIDTHS
              if w != 128}  # fmt: skip
    return {**found, **widths}
