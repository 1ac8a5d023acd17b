"""Llama-3-SynE's mixture (arXiv 2407.18743) of a small transformer: topics that follow perplexity, easy text first.

A Llama of two layers over bytes learns the standard library's documentation for 200 steps of 16 blocks. Then 100 steps
of three topics, documentation, code and the language reference, from equal shares: these stay, or follow the change of
the topics' perplexity on dev every 20 steps. And 100 steps of code in the order of its perplexity under the first
model, easy first, hard first, or as it comes. Nats a byte on modules and sections that gave no training text. The peak
rate is chosen on dev for every arm from one grid; of the topic update, which takes the fixed shares' rate, alpha.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.synthetic_mixture import perplexity_curriculum, topic_mixture_update
from w2s_fast.optim import RewarmCosineLR

from .. import transformer
from ..protocol import Choice, Claim, choose

METHOD = "synthetic_mixture"
STEPS, ROUNDS, TOPICS = 100, 5, ("documentation", "code", "reference")
RATES, ALPHAS, HELD = (3e-3, 8e-3), (1.0, 4.0), 224
ORDERS = ("as it comes", "easy first", "hard first")
FULL = {"STEPS": 400, "RATES": (1.5e-3, 3e-3, 8e-3, 1.2e-2), "ALPHAS": (0.5, 1.0, 2.0, 4.0, 8.0), "HELD": 512}
CLAIMS = [
    Claim("the topic update lowers the mean over topics", "mean", "topic update", "fixed shares", 0.0, "lower"),
    Claim("and the worst topic's loss", "worst", "topic update", "fixed shares", 0.0, "lower"),
    Claim("easy code first beats the order as it comes", "code", "easy first", "as it comes", 0.0, "lower"),
    Claim("and hard code first", "code", "easy first", "hard first", 0.0, "lower"),
]


@lru_cache(maxsize=3)
def base(seed: int) -> Any:
    """The model that has learned documentation."""
    return transformer.pretrained(seed)


def optimised(model: Any, rate: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = transformer.adamw(model, rate)
    return optimizer, RewarmCosineLR(optimizer, warmup=2, total=STEPS)


def rows(topic: str, seed: int) -> Tensor:
    """As many training blocks as one arm draws."""
    return transformer.blocks(transformer.sources()[topic, "train"], STEPS * transformer.BATCH, 100 * seed)


def mixed(rate: float, alpha: float, seed: int, on: str) -> dict[str, float]:
    """Fixed shares for alpha 0."""
    own, count = copy.deepcopy(base(seed)), STEPS * transformer.BATCH
    optimizer, schedule = optimised(own, rate)
    sampler = MixtureSampler([count] * len(TOPICS), [1.0] * len(TOPICS), num_samples=count,
                             batch_size=transformer.BATCH, seed=seed)  # fmt: skip
    data = TensorDataset(torch.cat([rows(topic, seed) for topic in TOPICS]))
    batches = iter(DataLoader(data, transformer.BATCH, sampler=sampler))
    weights, before = torch.ones(len(TOPICS)), transformer.nats(own, TOPICS, "dev").exp()
    for _ in range(ROUNDS):
        fit(own, (next(batches) for _ in range(STEPS // ROUNDS)), optimizer, transformer.loss, scheduler=schedule,
            clip=1.0)  # fmt: skip
        if alpha:
            after = transformer.nats(own, TOPICS, "dev").exp()
            weights, before = topic_mixture_update(weights, before, after, alpha), after
            sampler.set_weights(weights.tolist())
    found = transformer.nats(own, TOPICS, on, HELD)
    shares = (weights / weights.sum()).tolist()
    by_topic = {**dict(zip(TOPICS, found.tolist(), strict=True)),
                **{f"last share of {topic}": share for topic, share in zip(TOPICS, shares, strict=True)}}  # fmt: skip
    return {"mean": found.mean().item(), "worst": found.max().item(), **by_topic}


@lru_cache(maxsize=3)
def easy_first(seed: int) -> list[int]:
    """Places of the blocks of code by their perplexity under the first model."""
    return list(perplexity_curriculum(transformer.losses(base(seed), rows("code", seed))))


def ordered(order: str, rate: float, seed: int, on: str) -> dict[str, float]:
    """On code, once through."""
    own, code = copy.deepcopy(base(seed)), rows("code", seed)
    optimizer, schedule = optimised(own, rate)
    places = list(range(len(code))) if order == "as it comes" else easy_first(seed)
    if order == "hard first":
        places = places[::-1]
    fit(own, DataLoader(Subset(TensorDataset(code), places), transformer.BATCH), optimizer, transformer.loss,
        scheduler=schedule, clip=1.0)  # fmt: skip
    return {"code": transformer.nats(own, ("code",), on, HELD).item()}


def choices() -> dict[str, Choice]:
    def topics(rate: float, seed: int, on: str, alpha: float = 0.0) -> float:
        return mixed(rate, alpha, seed, on)["mean"]

    def order(name: str) -> Choice:
        return choose(lambda **setting: ordered(name, **setting)["code"], {"rate": RATES}, better="lower")

    fixed = choose(topics, {"rate": RATES}, better="lower")
    rate = (fixed.best["rate"],)
    update = choose(topics, {"rate": rate, "alpha": ALPHAS}, better="lower")
    return {"fixed shares": fixed, "topic update": update, **{name: order(name) for name in ORDERS}}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: mixed(chosen[arm]["rate"], chosen[arm].get("alpha", 0.0), seed, "test")
             for arm in ("fixed shares", "topic update")}  # fmt: skip
    return found | {name: ordered(name, chosen[name]["rate"], seed, "test") for name in ORDERS}
