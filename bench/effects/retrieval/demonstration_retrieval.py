"""Demonstration retrieval (arXiv 2307.00119): a retriever that learns from the reader's loss which examples help.

A task labels the ten digit classes at random with 4 labels, anew for every example; a bank holds 16 labelled training
digits, 4 are retrieved; the reader (MLPs over codes of query and demonstration, and the label) and the retriever (MLP
64-96-32, normalised, learned scale) minimise the marginal loss, 600 steps of 32. Percent right on 2000 queries and
banks of unseen digits: learned retriever, nearest pixels weighted by distance with a learned scale, nearest pixels with
equal weights, random demonstrations, none. The rate of every arm is chosen on dev.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.attacks import Stacked
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.retrieval.demonstration_retrieval import retrieve

from ..data import Split, digits
from ..protocol import SEEDS, Choice, Claim
from ..robust import at_best_rates, best_rates

BANK, SHOWN, LABELS, BATCH, STEPS, TESTED, RATES = 16, 4, 4, 32, 600, 2000, (1e-3, 3e-3, 1e-2)
ARMS = ("learned", "weighted pixels", "pixels", "random", "none")
FULL = {"RATES": (5e-4, 1e-3, 3e-3, 1e-2)}
CLAIMS = [
    Claim("the learned retriever is 30 points better than random demonstrations", "right", "learned", "random", 30.0),
    Claim("7 points better than weighted nearest pixels", "right", "learned", "weighted pixels", 7.0),
    Claim("without demonstrations a label is a guess", "right", "none", 28.0, 0.0, "lower"),
]


class Episode(NamedTuple):
    """Queries ``[N, 64]`` with labels, banks ``[N, M, 64]`` with labels, and a random rank of the demonstrations."""

    x: Tensor
    y: Tensor
    bank: Tensor
    labels: Tensor
    rank: Tensor


def episodes(split: Split, count: int, draw: torch.Generator) -> Episode:
    names = torch.randint(LABELS, (count, 10), generator=draw)
    q = torch.randint(len(split.y), (count,), generator=draw)
    d = torch.randint(len(split.y), (count, BANK), generator=draw)
    return Episode(split.x[q], names.gather(1, split.y[q][:, None])[:, 0], split.x[d], names.gather(1, split.y[d]),
                   torch.rand(count, BANK, generator=draw))  # fmt: skip


class Reader(nn.Module):
    """``forward((x, bank, labels, rank))``: log-probabilities of the labels ``[N, 4]``, demonstrations summed out."""

    def __init__(self, arm: str, seed: int) -> None:
        super().__init__()
        self.arm = arm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.code = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
            self.name = nn.Embedding(LABELS, 32)
            self.read = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, LABELS))
            self.look = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
            self.log_scale = nn.Parameter(torch.tensor(1.5))

    def found(self, x: Tensor, bank: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and scores of the demonstrations shown."""
        if self.arm == "learned":
            a, b = (F.normalize(self.look(part), dim=-1) for part in (x, bank))
            near = retrieve(a, b, SHOWN, scale=self.log_scale.exp())
            return near.index, near.scores
        pixels = -(x[:, None] - bank).square().sum(-1)
        index = (rank if self.arm == "random" else pixels).topk(SHOWN, -1).indices
        scores = pixels.gather(1, index) * 0.2 * self.log_scale.exp()
        return index, scores if self.arm == "weighted pixels" else torch.zeros_like(scores)

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        x, bank, labels, rank = given
        if self.arm == "none":
            bank, labels, scores = torch.zeros_like(bank[:, :1]), torch.zeros_like(labels[:, :1]), rank[:, :1]
        else:
            index, scores = self.found(x, bank, rank)
            bank = bank.gather(1, index[..., None].expand(-1, -1, 64))
            labels = labels.gather(1, index)
        a = self.code(x)[:, None].expand(-1, bank.shape[1], -1)
        z = self.read(torch.cat((a, (a - self.code(bank)).square(), self.name(labels)), -1)).log_softmax(-1)
        return (scores.log_softmax(-1)[..., None] + z).logsumexp(1)


@lru_cache(maxsize=64)
def table(arm: str, rate: float, seeds: tuple[int, ...], on: str) -> dict[int, float]:
    splits = [digits(seed) for seed in seeds]
    stack, draw = Stacked([Reader(arm, seed) for seed in seeds]), torch.Generator().manual_seed(sum(seeds))

    def batch(part: str, count: int) -> Episode:
        rows = [episodes(split[part], count, draw) for split in splits]
        return Episode(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def run(stack: Stacked, e: Episode) -> Tensor:
        state = dict(stack.base.named_parameters())

        def one(state: dict[str, Tensor], *given: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(stack.base, state, (given,))
            return found

        z: Tensor = torch.vmap(one)(state, e.x, e.bank, e.labels, e.rank)
        return z

    def loss(stack: Any, _: int) -> Tensor:
        e = batch("train", BATCH)
        return -run(stack, e).gather(-1, e.y[..., None]).mean(1).sum()

    steps = 100 if arm == "none" else STEPS
    train(stack, loss, range(100), Recipe(steps, rate, clip=None, schedule="linear"))
    draw.manual_seed(9)
    with torch.no_grad():
        e = batch(on, TESTED)
        right = (run(stack, e).argmax(-1) == e.y).double().mean(1)
    return {seed: 100 * value for seed, value in zip(seeds, right.tolist(), strict=True)}


def choices() -> dict[str, Choice]:
    return best_rates(table, ARMS, RATES)


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return at_best_rates(table, ARMS, chosen, seed, SEEDS)
