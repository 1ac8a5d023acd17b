"""Skill-it (arXiv 2307.14430) of a small transformer on four kinds of real text, with a graph that is learned.

The skills are the standard library's documentation, its code, the language reference that `help` shows, and its
generated tables. A Llama of two layers over bytes starts from nothing. The graph comes from ten short runs on one or
two skills (40 steps each, losses on dev), then 120 steps of 16 blocks in six rounds: Skill-it, whose mixture follows
the losses on dev through that graph, or equal shares. Mean over skills of the nats a byte on text that trained nothing,
and the worst skill's. The rate is chosen on dev for equal shares and serves both, then eta; the runs for the graph are
not counted as training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.skill_it import SkillIt, learn_graph
from w2s_fast.optim import RewarmCosineLR

from .. import transformer
from ..llama import Size, llama
from ..protocol import Choice, Claim, choose

METHOD = "skill_it"
SKILLS, STEPS, ROUNDS, SHORT = ("documentation", "code", "reference", "tables"), 120, 6, 40
RATES, ETAS, HELD = (3e-3, 1e-2), (0.1, 0.2), 256
FULL = {"STEPS": 480, "RATES": (1.5e-3, 3e-3, 6e-3, 1e-2), "ETAS": (0.05, 0.1, 0.2, 0.5, 1.0), "HELD": 512}
CLAIMS = [
    Claim("Skill-it beats equal shares in the mean", "mean", "Skill-it", "equal shares", 0.0, "lower"),
    Claim("and in the worst skill", "worst", "Skill-it", "equal shares", 0.0, "lower"),
]


class Run:
    """A fresh model and its training on some of the skills, from equal shares."""

    def __init__(self, skills: Sequence[int], steps: int, rate: float, seed: int) -> None:
        self.model = llama(Size(64, 2, 4), transformer.VOCABULARY, seed, positions=transformer.LENGTH)
        self.optimizer = transformer.adamw(self.model, rate)
        self.schedule = RewarmCosineLR(self.optimizer, warmup=5, total=steps)
        count = steps * transformer.BATCH
        trained = [transformer.sources()[SKILLS[i], "train"] for i in skills]
        rows = [transformer.blocks(part, count, 100 * seed + i) for i, part in zip(skills, trained, strict=True)]
        self.sampler = MixtureSampler([count] * len(rows), [1.0] * len(rows), num_samples=count,
                                      batch_size=transformer.BATCH, seed=seed)  # fmt: skip
        self.batches = iter(DataLoader(TensorDataset(torch.cat(rows)), transformer.BATCH, sampler=self.sampler))

    def go(self, steps: int) -> None:
        """Train on."""
        fit(self.model, (next(self.batches) for _ in range(steps)), self.optimizer, transformer.loss,
            scheduler=self.schedule, clip=1.0)  # fmt: skip


@lru_cache(maxsize=8)
def graph(rate: float, seed: int) -> Tensor:
    """Learned from what one and two skills do for each other in short runs."""

    def train(skills: Sequence[int]) -> Tensor:
        short = Run(skills, SHORT, rate, seed)
        short.go(SHORT)
        return transformer.nats(short.model, SKILLS, "dev")

    return learn_graph(train, len(SKILLS))


def run(rate: float, eta: float, seed: int, on: str) -> dict[str, float]:
    """Equal shares for eta 0."""
    whole = Run(range(len(SKILLS)), STEPS, rate, seed)
    skill_it = SkillIt(whole.sampler, graph(rate, seed), eta) if eta else None
    for turn in range(ROUNDS):
        if skill_it is not None and turn:
            skill_it.update(transformer.nats(whole.model, SKILLS, "dev"))
        whole.go(STEPS // ROUNDS)
    found = transformer.nats(whole.model, SKILLS, on, HELD)
    return {"mean": found.mean().item(), "worst": found.max().item(), **dict(zip(SKILLS, found.tolist(), strict=True))}


def choices() -> dict[str, Choice]:
    def dev(rate: float, seed: int, on: str, eta: float = 0.0) -> float:
        return run(rate, eta, seed, on)["mean"]

    equal = choose(dev, {"rate": RATES}, better="lower")
    rate = (equal.best["rate"],)
    return {"equal shares": equal, "Skill-it": choose(dev, {"rate": rate, "eta": ETAS}, better="lower")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    rate = chosen["equal shares"]["rate"]
    edges = graph(rate, seed).count_nonzero().item() - len(SKILLS)
    return {"equal shares": run(rate, 0.0, seed, "test"),
            "Skill-it": {**run(rate, chosen["Skill-it"]["eta"], seed, "test"), "edges": float(edges)}}  # fmt: skip
