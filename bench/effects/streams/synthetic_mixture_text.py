"""Llama-3-SynE's data recipe (arXiv 2407.18743) with a small transformer: from prose to the code of five packages.

A Llama of two layers over bytes learns the standard library's prose for 200 steps of 16 blocks, then 100 steps of code
and prose, 8 : 2; the code has five topics, packages of the standard library, in equal shares. Arms: equal shares in a
random order; topic weights updated every 25 steps from the perplexities on dev; the same blocks easy first, or hard
first, by the perplexity of the model that learned prose. Warm-up of 10 steps, then constant (WSD). Nats a byte on
modules that gave no training text: mean over the topics, the worst topic, prose. The rate is chosen on dev for the
fixed shares, the baseline, and serves all arms.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.synthetic_mixture import perplexity_curriculum, topic_mixture_update
from w2s_fast.optim import WSDLR

from .. import transformer
from ..protocol import Choice, Claim, choose

METHOD = "synthetic_mixture"
TOPICS = ("asyncio", "email", "multiprocessing", "unittest", "xml")
STEPS, EVERY, PROSE, POOL = 100, 25, 0.2, 1600
RATES = (2e-3, 5e-3, 1.2e-2)
ARMS = ("fixed", "topics", "easy first", "hard first")
CLAIMS = [
    Claim("topic updates lower the worst topic's loss", "worst", "topics", "fixed", 0.0, "lower"),
    Claim("and cost at most 0.02 nats a byte in the mean over topics", "mean", "topics", "fixed", -0.02, "lower"),
    Claim("easy documents first beat a random order in the mean", "mean", "easy first", "fixed", 0.0, "lower"),
    Claim("they beat hard ones first in the mean", "mean", "easy first", "hard first", 0.0, "lower"),
    Claim("a fifth of prose keeps the loss on prose within 0.05 of that before", "prose", "fixed", "before", -0.05,
          "lower"),
]  # fmt: skip


@lru_cache(maxsize=1)
def code() -> dict[str, dict[str, Tensor]]:
    return transformer.topics(TOPICS)


@lru_cache(maxsize=3)
def prepared(seed: int) -> tuple[Any, TensorDataset]:
    """The model that learned prose, and `POOL` blocks of every topic and of prose, one source after the other."""
    sources = [code()[name]["train"] for name in TOPICS] + [transformer.parts()["prose", "train"]]
    rows = [transformer.blocks(ids, POOL, 100 * seed + i) for i, ids in enumerate(sources)]
    return transformer.pretrained(seed), TensorDataset(torch.cat(rows))


def by_topic(model: Any, on: str) -> Tensor:
    """Nats a byte of every topic."""
    parts = [transformer.blocks(code()[name][on], 128, 7) for name in TOPICS]
    return torch.stack([transformer.losses(model, part).mean() for part in parts])


def shares(topics: Tensor) -> list[float]:
    return [*((1 - PROSE) * topics / topics.sum()).tolist(), PROSE]


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    base, pool = prepared(seed)
    model, topics = copy.deepcopy(base), torch.ones(len(TOPICS))
    optimizer = transformer.adamw(model, rate)
    schedule = WSDLR(optimizer, total=STEPS, warmup=10)
    sampler = MixtureSampler([POOL] * (len(TOPICS) + 1), shares(topics), num_samples=STEPS * transformer.BATCH,
                             batch_size=transformer.BATCH, seed=seed)  # fmt: skip
    if arm in ("easy first", "hard first"):
        drawn = torch.tensor(list(sampler))
        places = (drawn < POOL * len(TOPICS)).nonzero()[:, 0]  # prose stays where it is
        scores = transformer.losses(base, pool.tensors[0][drawn[places]])
        drawn[places] = drawn[places][list(perplexity_curriculum(scores, order=arm.split()[0]))]
        batches = iter(DataLoader(pool, transformer.BATCH, sampler=drawn.tolist()))
    else:
        batches = iter(DataLoader(pool, transformer.BATCH, sampler=sampler))
    before = by_topic(model, "dev") if arm == "topics" else None
    for start in range(0, STEPS, EVERY):
        fit(model, (next(batches) for _ in range(EVERY)), optimizer, transformer.loss, scheduler=schedule, clip=1.0)
        if before is not None and start + EVERY < STEPS:
            after = by_topic(model, "dev")
            topics = topic_mixture_update(topics, before.exp(), after.exp())
            sampler.set_weights(shares(topics))
            before = after
    return measured(model, on)


def measured(model: Any, on: str) -> dict[str, float]:
    found = by_topic(model, on)
    prose = transformer.blocks(transformer.parts()["prose", on], 256, 7)
    return {"mean": found.mean().item(), "worst": found.max().item(),
            "prose": transformer.losses(model, prose).mean().item()}  # fmt: skip


def choices() -> dict[str, Choice]:
    def dev(rate: float, seed: int, on: str) -> float:
        return run("fixed", rate, seed, on)["mean"]

    return {"fixed": choose(dev, {"rate": RATES}, better="lower")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: run(arm, chosen["fixed"]["rate"], seed, "test") for arm in ARMS}
    return {"before": measured(prepared(seed)[0], "test"), **found}
