"""S3T (arXiv 2406.16257): how many deletions a model of shards survives, and how well it answers meanwhile.

A residual network that 80 public digits have trained adapts to 997 private ones: three shards of four slices, LoRA of
rank 4 on four blocks from the top, 40 steps a stage. Samples are deleted at random, nothing is trained again: *life* is
how many until no shard has a stage, with one order of the slices (sliced SISA) or four (mean of 200 runs); *right* the
accuracy after ten deletions (mean of forty). *Identical* is the share of stages before a deleted sample's slice that
are, bit for bit, what training without the sample makes. The rate is chosen on dev.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.adapters import s3t

from ..data import digits
from ..protocol import Choice, Claim, choose

PUBLIC, SHARDS, SLICES, WIDTH, RANK, STEPS, DELETED, RATES = 80, 3, 4, 48, 4, 40, 10, (1e-2, 3e-2, 1e-1)
RUNS, ANSWERS = 200, 40  # orders of deletions; of those whose answers are counted
CLAIMS = [
    Claim("with four orders the shards live 1.4 times as long as with one", "longer", "four orders", 1.4),
    Claim("life is at least 92 % of the theory's", "life over theory", "four orders", 0.92),
    Claim("after ten deletions four orders answer better than one", "right", "four orders", "one order"),
    Claim("stages before a deleted sample are those of training without it", "identical", "four orders", 1.0, -1e-6),
    Claim("the stages from it on are not", "identical after", "four orders", 0.0, -1e-6, "lower"),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(SLICES))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.inside(x).relu()
        for block in self.blocks:
            h = h + block(h).relu() / 2
        return self.head(h)


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def adapted(seed: int, rate: float, budget: int) -> tuple[s3t.S3T, TensorDataset, Recipe]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, own = Residual(), digits(seed)["train"]
        rows = torch.randint(PUBLIC, (150, 32))
    train(model, lambda model, i: loss(model, (own.x[rows[i]], own.y[rows[i]])), range(150), Recipe(150, 3e-3))
    data = TensorDataset(own.x[PUBLIC:], own.y[PUBLIC:])
    recipe = Recipe(STEPS, rate, batch=32, schedule="constant", seed=seed)
    blocks = [[f"blocks.{i}"] for i in range(SLICES)]
    made = s3t.fit(model, data, loss, blocks, recipe, shards=SHARDS, slices=SLICES, budget=budget, rank=RANK)
    return made, data, recipe


def accuracy(made: s3t.S3T, seed: int, on: str) -> float:
    held = digits(seed)[on]
    return 100 * (made.probabilities(held.x).argmax(1) == held.y).double().mean().item()


def restricted(made: s3t.S3T, budget: int) -> s3t.S3T:
    """The same with the first orders only; deletions there leave ``made`` alone."""
    part = s3t.S3T(made.model, made.groups, copy.deepcopy(made.slices), made.orders[:budget])
    part.stages = {place: list(stages) for place, stages in made.stages.items() if place[1] < budget}
    return part


def survived(made: s3t.S3T, budget: int, seed: int) -> dict[str, float]:
    life, right = [], []
    for run in range(RUNS):
        part, count = restricted(made, budget), sum(len(piece) for shard in made.slices for piece in shard)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + run)).tolist()
        for done, sample in enumerate(order, 1):
            part.delete(sample)
            if done == DELETED and run < ANSWERS:
                right.append(accuracy(part, seed, "test"))
            if len(part.exhausted) == SHARDS:
                life.append(done)
                break
    # coupons: as many slices as there are first ones of the orders must all be hit
    theory = SHARDS * SLICES * sum(1 / i for i in range(1, SHARDS * budget + 1))
    mean = sum(life) / RUNS
    return {"life": mean, "life over theory": mean / theory, "right": sum(right) / ANSWERS}


def exactness(made: s3t.S3T, data: TensorDataset, recipe: Recipe) -> dict[str, float]:
    """Of the first shard's stages, before and from the slice of a sample of its second slice on."""
    part = restricted(made, len(made.orders))
    part.delete(part.slices[0][1][0])
    same: dict[bool, list[bool]] = {True: [], False: []}
    for i, order in enumerate(made.orders):
        without = s3t.chain(part, data, loss, 0, i, recipe)
        for k, (ours, theirs) in enumerate(zip(made.stages[0, i], without, strict=True)):
            same[k < order.index(1)].append(all(torch.equal(value, theirs[name]) for name, value in ours.items()))
    shares = {before: sum(found) / len(found) for before, found in same.items()}
    return {"identical": shares[True], "identical after": shares[False]}


def choices() -> dict[str, Choice]:
    return {"LoRA": choose(lambda rate, seed, on: accuracy(adapted(seed, rate, 1)[0], seed, on), {"rate": RATES})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    made, data, recipe = adapted(seed, chosen["LoRA"]["rate"], SLICES)
    found = {name: survived(made, budget, seed) for name, budget in (("one order", 1), ("four orders", SLICES))}
    found["four orders"]["longer"] = found["four orders"]["life"] / found["one order"]["life"]
    found["four orders"] |= {"right at first": accuracy(made, seed, "test"), **exactness(made, data, recipe)}
    return found
