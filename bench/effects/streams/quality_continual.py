"""Continual pre-training on selected data (arXiv 2406.14833): a half-shared new language whose corpus is 40 % junk.

Two order-2 Markov languages that share half of their contexts, an MLP language model, AdamW 3e-3 to 3e-4, batch 128.
After 500 steps on the old language, 500 steps on: the new corpus as it is; the part of a larger one that a trigram
model of reference text finds likeliest (as many documents); a quarter of that, four epochs; all of it with 30 % old
data. Losses in nats. The regime is that of the text, which leaves the languages' size and sharpness open: on dev those
are taken that come closest to the losses that the text reports before any arm begins (2.02 on the old language, 3.11
on the new). The new language's loss shows no dip before it falls in this regime, and none is claimed.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.continual_pretraining import continue_training, rewarm
from w2s_fast.methods.streams.quality_continual import Ngram, quality_filter
from w2s_fast.optim import RewarmCosineLR

from .. import markov
from ..protocol import Choice, Claim, choose

STEPS, BATCH, PEAK, LENGTH, JUNK, REPLAY = 500, 128, 3e-3, 50, 0.4, 0.3
LANGUAGES, LEVELS = {"tokens": (12, 24), "sharpness": (1.2, 1.6, 2.0, 2.4, 2.8)}, {"old": 2.02, "new": 3.11}
CLAIMS = [
    Claim("selected documents beat the whole corpus by 0.15 on the new language", "new", "selected", "junk", 0.15,
          "lower"),
    Claim("a quarter of them, four epochs, is within 0.08", "new", "quarter, four epochs", "selected", -0.08, "lower"),
    Claim("30 % old data lower the old loss by 0.3", "old", "selected, 30 % old", "selected", 0.3, "lower"),
    Claim("and cost at most 0.15 on the new language", "new", "selected, 30 % old", "selected", -0.15, "lower"),
    Claim("the trigram model leaves at most 1 % junk", "junk kept", "selected", 0.01, 0.0, "lower"),
]  # fmt: skip


def corpus(table: Tensor, documents: int, seed: int) -> tuple[Tensor, Tensor]:
    """Documents ``[documents, LENGTH]``, and which of them are junk: uniform tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(table), (documents, LENGTH), generator=draw)
    junk = torch.rand(documents, generator=draw) < JUNK
    clean = rows.clone()
    for at in range(2, LENGTH):
        clean[:, at] = torch.multinomial(table[clean[:, at - 2], clean[:, at - 1]], 1, generator=draw)[:, 0]
    return torch.where(junk[:, None], rows, clean), junk


def pairs(rows: Tensor) -> TensorDataset:
    """Contexts and next tokens of documents."""
    windows = rows.unfold(1, 3, 1).reshape(-1, 3)
    return TensorDataset(windows[:, :2], windows[:, 2])


class Begun(NamedTuple):
    """What all arms begin with: the new language, old text, other text of both, a model of the old one, its losses."""

    table: Tensor
    old: tuple[Tensor, Tensor]
    tests: dict[str, tuple[Tensor, Tensor]]
    model: markov.Model
    losses: dict[str, float]


def begun(seed: int, tokens: int, sharpness: float) -> Begun:
    old_table = markov.language(tokens, 10 * seed, sharpness)
    new_table = markov.language(tokens, 10 * seed + 1, sharpness, like=old_table, shared=0.5)
    old = markov.text(old_table, STEPS * BATCH, 10 * seed + 2)
    tests = {"old": markov.text(old_table, 8192, 10 * seed + 3), "new": markov.text(new_table, 8192, 10 * seed + 4)}
    model = markov.Model(tokens, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, fused=True)
    fit(model, markov.batches(old, BATCH, STEPS, seed), optimizer, clip=1.0,
        scheduler=RewarmCosineLR(optimizer, warmup=5, total=STEPS))  # fmt: skip
    losses = {name: markov.loss_on(model, test) for name, test in tests.items()}
    return Begun(new_table, old, tests, model, losses)


def choices() -> dict[str, Choice]:
    def off(tokens: int, sharpness: float, seed: int, on: str) -> float:
        losses = begun(seed, tokens, sharpness).losses
        return sum(abs(losses[name] - level) for name, level in LEVELS.items())

    return {"languages": choose(off, LANGUAGES, better="lower")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    new_table, old, tests, model, losses = begun(seed, **chosen["languages"])
    count = -(-STEPS * BATCH // (LENGTH - 2))
    whole, _ = corpus(new_table, count, 10 * seed + 5)
    larger, junk = corpus(new_table, round(count / (1 - JUNK) * 1.03), 10 * seed + 6)
    reference, bad = corpus(new_table, 200, 10 * seed + 7)
    scorer = Ngram(reference[~bad].tolist(), len(new_table))
    kept = quality_filter(torch.tensor([scorer.loss(ids) for ids in larger.tolist()]), count / len(larger))
    arms = {
        "junk": (whole, 1, 0.0), "selected": (larger[kept], 1, 0.0),
        "quarter, four epochs": (larger[kept[::4]], 4, 0.0), "selected, 30 % old": (larger[kept], 1, REPLAY),
    }  # fmt: skip
    found = {"base": losses}
    for arm, (rows, epochs, replay) in arms.items():
        own = copy.deepcopy(model)
        again = torch.optim.AdamW(own.parameters(), lr=PEAK, fused=True)
        part = pairs(rows)
        size = STEPS // epochs * (BATCH - round(replay * BATCH))
        continue_training(own, TensorDataset(*part[:size]), TensorDataset(*old), again, replay=replay, batch_size=BATCH,
                          epochs=epochs, schedule=rewarm(), seed=seed)  # fmt: skip
        found[arm] = {name: markov.loss_on(own, test) for name, test in tests.items()}
    found["selected"]["junk kept"] = junk[kept].float().mean().item()
    return found
