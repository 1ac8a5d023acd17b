"""Continual pre-training (arXiv 2403.08763): re-warming, replay and an infinite schedule on two synthetic languages.

Order-2 Markov languages over 12 tokens, an MLP language model, AdamW down to a tenth of the peak rate, batch 128, 500
steps on the old language and 500 on the new: at the minimum rate, re-warmed, and re-warmed with 5, 25 and 50 % replay;
against 1000 steps on both from the start. Then one language of 24 tokens, 1000 and another 1000 steps on the same
distribution: re-warming against the infinite schedule, annealed over the last 200, and one cosine. Losses in nats on
unseen text, dev and test apart. The peak rate of every arm is chosen on dev from one grid: of the first 500 steps by
the old language's loss, at the minimum rate (a tenth) by the new one's, of the others by the mean of both; on the same
data by the loss at the end. The regime is that of the text but for the languages' sharpness, which it leaves open: of 2
and 2.3, tried on seed 100, 2 is taken; the 24-token language is then harder than the text's (2.31 nats before the
change, not 2.04).
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.continual_pretraining import continue_training, rewarm
from w2s_fast.optim import InfiniteLR, RewarmCosineLR

from .. import markov
from ..protocol import Choice, Claim, choose

STEPS, HALF, BATCH = 500, 1000, 128
RATES = (1.5e-3, 3e-3, 6e-3)
FULL = {"RATES": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)}
SHARES = {"minimum rate": 0.0, "re-warm": 0.0, "5 % replay": 0.05, "25 % replay": 0.25, "50 % replay": 0.5}
SAME = ("re-warm", "infinite", "one cosine")
#: What the rate of an arm is chosen by.
BY = {"before": "old", "minimum rate": "new", **dict.fromkeys((*list(SHARES)[1:], "union"), "mean")}
CLAIMS = [
    Claim("re-warming beats the minimum rate by 0.15 on the new language", "new", "re-warm", "minimum rate", 0.15,
          "lower"),
    Claim("25 % replay beats none by 0.35 in the mean of both", "mean", "25 % replay", "re-warm", 0.35, "lower"),
    Claim("50 % replay is within 0.05 of training on both for twice as long", "mean", "50 % replay", "union", -0.05,
          "lower"),
    Claim("5 % replay costs at most 0.05 on the new language", "new", "5 % replay", "re-warm", -0.05, "lower"),
    Claim("re-warming raises the loss by 0.05 where the data stay the same", "rise", "same data: re-warm", 0.0, 0.05),
    Claim("the infinite schedule raises it by at most 0.01", "rise", "same data: infinite", 0.0, -0.01, "lower"),
    Claim("annealed, it ends within 0.02 of one cosine over all steps", "end", "same data: infinite",
          "same data: one cosine", -0.02, "lower"),
]  # fmt: skip


def trained(model: Any, optimizer: Any, scheduler: Any, part: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    fit(model, markov.batches(part, BATCH, steps, seed), optimizer, scheduler=scheduler, clip=1.0)


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=True)


class Languages(NamedTuple):
    """Two languages' training text, and dev and test parts of both."""

    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    held: dict[str, list[tuple[Tensor, Tensor]]]


@lru_cache(maxsize=4)
def languages(seed: int) -> Languages:
    tables = [markov.language(12, 10 * seed + i, 2.0) for i in range(2)]
    old, new = (markov.text(table, STEPS * BATCH, 10 * seed + 2 + i) for i, table in enumerate(tables))
    return Languages(old, new, {
        on: [markov.text(table, 4096, 10 * seed + first + i) for i, table in enumerate(tables)]
        for on, first in (("test", 4), ("dev", 6))
    })  # fmt: skip


@lru_cache(maxsize=16)
def before(seed: int, rate: float) -> tuple[Any, dict[str, Any]]:
    """A model that knows the old language, and its optimizer's state."""
    model = markov.Model(12, seed)
    optimizer = adamw(model, rate)
    schedule = RewarmCosineLR(optimizer, warmup=5, total=STEPS)
    trained(model, optimizer, schedule, languages(seed).old, STEPS, seed)
    return model, optimizer.state_dict()


def two_languages(arm: str, rate: float, seed: int, on: str, first: float) -> dict[str, float]:
    """An arm whose peak rate is ``rate``, after ``first`` in the first steps."""
    given = languages(seed)
    if arm == "union":
        model = markov.Model(12, seed)
        optimizer = adamw(model, rate)
        both = (torch.cat((given.old[0], given.new[0])), torch.cat((given.old[1], given.new[1])))
        trained(model, optimizer, RewarmCosineLR(optimizer, warmup=10, total=2 * STEPS), both, 2 * STEPS, seed)
    else:
        model, state = copy.deepcopy(before(seed, first))
        if arm != "before":
            optimizer, share = adamw(model, rate / 10), SHARES[arm]
            optimizer.load_state_dict(state)
            size = STEPS * (BATCH - round(share * BATCH))  # the same number of steps: replay extends no budget
            constant = rewarm(rate / 10, warmup=0.0, min_ratio=1.0)
            continue_training(model, TensorDataset(*(t[:size] for t in given.new)), TensorDataset(*given.old),
                              optimizer, replay=share, batch_size=BATCH, seed=seed,
                              schedule=constant if arm == "minimum rate" else rewarm(rate))  # fmt: skip
    losses = [markov.loss_on(model, part) for part in given.held[on]]
    return {"old": losses[0], "new": losses[1], "mean": sum(losses) / 2}


@lru_cache(maxsize=4)
def same_language(seed: int) -> tuple[list[tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Two pieces of training text of one language of 24 tokens, dev and test."""
    table = markov.language(24, 10 * seed)
    parts = [markov.text(table, HALF * BATCH, 10 * seed + 2 + i) for i in range(2)]
    return parts, {on: markov.text(table, 8192, 10 * seed + first) for on, first in (("test", 4), ("dev", 5))}


def same_data(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    (one, two), held = same_language(seed)
    model = markov.Model(24, seed)
    optimizer = adamw(model, rate)
    scheduler: Any = RewarmCosineLR(optimizer, warmup=10, total=HALF if arm == "re-warm" else 2 * HALF)
    if arm == "infinite":
        scheduler = InfiniteLR(optimizer, warmup=10, cooldown=250)
    trained(model, optimizer, scheduler, one, HALF, seed)
    start, highest = markov.loss_on(model, held[on]), 0.0
    if arm == "re-warm":
        scheduler = RewarmCosineLR(optimizer, warmup=10, total=HALF, max_lr=rate)
    for piece in range(40):
        if arm == "infinite" and piece == 32:
            scheduler.start_annealing(HALF // 5)
        trained(model, optimizer, scheduler, two, HALF // 40, 100 * seed + piece + 50)
        if on == "test":  # on dev the end counts
            highest = max(highest, markov.loss_on(model, held[on]) - start)
    return {"before": start, "rise": highest, "end": markov.loss_on(model, held[on])}


def choices() -> dict[str, Choice]:
    def first(rate: float, seed: int, on: str) -> float:
        return two_languages("before", rate, seed, on, rate)["old"]

    def dev(arm: str) -> Choice:
        def value(rate: float, seed: int, on: str) -> float:
            return two_languages(arm, rate, seed, on, peak)[BY[arm]]

        return choose(value, {"rate": RATES}, better="lower")

    def same(arm: str) -> Choice:
        return choose(lambda **setting: same_data(arm, **setting)["end"], {"rate": RATES}, better="lower")

    found = {"before": choose(first, {"rate": RATES}, better="lower")}
    peak = found["before"].best["rate"]
    return {**found, **{arm: dev(arm) for arm in (*SHARES, "union")},
            **{f"same data: {arm}": same(arm) for arm in SAME}}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    first = chosen["before"]["rate"]
    found = {arm: two_languages(arm, chosen[arm]["rate"], seed, "test", first) for arm in BY}
    return found | {name: same_data(arm, chosen[name]["rate"], seed, "test")
                    for arm, name in ((arm, f"same data: {arm}") for arm in SAME)}  # fmt: skip
