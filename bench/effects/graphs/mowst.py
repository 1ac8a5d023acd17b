"""Mowst (arXiv 2311.05185): 1797 digits as nodes, half of them whole among strangers, half masked among their like.

A whole digit has six neighbours, each of its class with probability 0.1; a masked one keeps each pixel with probability
0.15 (else the pixel's mean), its neighbours are of its class with probability 0.9. Per seed 1000 training, 300
validation (of them 150 choose the rate), 497 test nodes. Weak expert MLP 64-32-10, strong expert a graph convolution
64-32-10, AdamW, 100 steps a phase. Arms: each expert alone, the mean of the two, Mowst by its expected answer and by
the hard rule, Mowst*.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from w2s_fast import checks
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.loop import train as run_loop
from w2s_fast.methods.graphs.mowst import Graph, Mowst, train

from ..protocol import Choice, Claim, choose

STEPS, NEIGHBOURS = 100, 6
RATES = (3e-3, 1e-2, 3e-2)
CLAIMS = [
    Claim("15 points above the better expert: Mowst, hard rule", "accuracy", "mowst, hard", "better expert", 0.15),
    Claim("15 points above the better expert: Mowst*", "accuracy", "star", "better expert", 0.15),
    Claim("above the mean of experts trained apart", "accuracy", "mowst, hard", "mean of both"),
    Claim("the gate tells them apart: confidence on whole less that on masked digits", "gap", "mowst, hard", 0.5),
]


class Convolution(nn.Module):
    """Two layers over a normalised adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 32), nn.Linear(32, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        hidden = torch.sparse.mm(edge_index, self.one(x)).relu()
        return torch.sparse.mm(edge_index, self.two(self.dropout(hidden)))


@lru_cache(maxsize=8)
def graph(seed: int) -> tuple[Graph, Tensor, dict[str, Tensor]]:
    """The graph, which nodes are whole, and the nodes of dev and test."""
    with checks.extra("demo"):
        from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pictures).float() / 16, torch.from_numpy(labels).long()
    x -= x.mean(0)
    n, draw = len(y), torch.Generator().manual_seed(seed)
    whole = torch.rand(n, generator=draw) < 0.5
    x = torch.where(whole[:, None] | (torch.rand(x.shape, generator=draw) < 0.15), x, 0.0)
    rows, columns = [torch.arange(n)], [torch.arange(n)]
    of_class = [(y == c).nonzero()[:, 0] for c in range(10)]
    for i in range(n):
        alike = torch.rand(NEIGHBOURS, generator=draw) < (0.1 if whole[i] else 0.9)
        own = of_class[int(y[i])]
        near = own[torch.randint(len(own), (NEIGHBOURS,), generator=draw)]
        columns.append(torch.where(alike, near, torch.randint(n, (NEIGHBOURS,), generator=draw)))
        rows.append(torch.full((NEIGHBOURS,), i))
    at = torch.stack((torch.cat(rows), torch.cat(columns)))
    adjacency = torch.sparse_coo_tensor(at, torch.full((at.shape[1],), 1 / (NEIGHBOURS + 1)), (n, n)).coalesce()
    order = torch.randperm(n, generator=draw)
    masks = torch.zeros(4, n, dtype=torch.bool)
    for mask, part in zip(masks, order.split([1000, 150, 150, 497]), strict=True):
        mask[part] = True
    return Graph(x, y, adjacency, masks[0], masks[1]), whole, {"dev": masks[2], "test": masks[3]}


def model(seed: int) -> Mowst:
    torch.manual_seed(seed)
    weak = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    return Mowst(weak, Convolution())


def accuracy(p: Tensor, seed: int, on: str) -> float:
    data, _, parts = graph(seed)
    return (p.argmax(1) == data.y)[parts[on]].float().mean().item()


def recipe(rate: float, seed: int) -> Recipe:
    return Recipe(STEPS, rate, schedule="constant", clip=None, decay=1e-3, seed=seed)


@lru_cache(maxsize=32)  # two arms choose their rates from the same trainings
@torch.no_grad()
def experts(rate: float, seed: int, on: str) -> dict[str, float]:
    """Each expert alone and their mean."""
    data, _, _ = graph(seed)
    both = model(seed)
    with torch.enable_grad():
        for expert, given in ((both.weak, (data.x,)), (both.strong, (data.x, data.edge_index))):
            run_loop(expert, lambda net, _, given=given: cross_entropy(net(*given)[data.train_mask],
                                                                      data.y[data.train_mask]), range(STEPS),
                     recipe(rate, seed))  # fmt: skip
    p = both.eval().weak(data.x).softmax(1), both.strong(data.x, data.edge_index).softmax(1)
    found = {"weak": accuracy(p[0], seed, on), "strong": accuracy(p[1], seed, on)}
    return {**found, "better expert": max(found.values()), "mean of both": accuracy(p[0] + p[1], seed, on)}


@torch.no_grad()
def mowst(form: str, rate: float, seed: int, on: str) -> dict[str, float]:
    data, whole, _ = graph(seed)
    made = model(seed)
    with torch.enable_grad():
        train(made, data, recipe=recipe(rate, seed), form=form)  # type: ignore[arg-type]
    c = made.confidence(made.weak(data.x))
    hard = made(data, torch.full(c.shape, 0.5))
    return {
        "accuracy": accuracy(made(data), seed, on), "hard": accuracy(hard, seed, on),
        "gap": (c[whole].mean() - c[~whole].mean()).item(), "strong's nodes": (c < 0.5).float().mean().item(),
    }  # fmt: skip


def choices() -> dict[str, Choice]:
    alone = {name: choose(lambda rate, seed, on, name=name: experts(rate, seed, on)[name], {"rate": RATES})
             for name in ("better expert", "mean of both")}  # fmt: skip
    found = {form: choose(lambda rate, seed, on, form=form, by=by: mowst(form, rate, seed, on)[by], {"rate": RATES})
             for form, by in (("mowst", "hard"), ("star", "accuracy"))}  # fmt: skip
    return {**alone, **found}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    run = partial(experts, seed=seed, on="test")
    found = {name: {"accuracy": value} for name, value in run(chosen["better expert"]["rate"]).items()}
    found["mean of both"] = {"accuracy": run(chosen["mean of both"]["rate"])["mean of both"]}
    for form in ("mowst", "star"):
        got = mowst(form, chosen[form]["rate"], seed, "test")
        name = "mowst, hard" if form == "mowst" else "star"
        found[name] = {"accuracy": got["hard"] if form == "mowst" else got["accuracy"], "gap": got["gap"],
                       "strong's nodes": got["strong's nodes"]}  # fmt: skip
        if form == "mowst":
            found["mowst, expected"] = {"accuracy": got["accuracy"]}
    return found
