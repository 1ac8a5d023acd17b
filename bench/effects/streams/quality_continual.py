"""Continual pre-training on selected data (arXiv 2406.14833): a half-shared new language whose corpus is 40 % junk.

Two order-2 Markov languages over 24 tokens that share half of their contexts, an MLP language model, AdamW 3e-3 to
3e-4, batch 128. After 500 steps on the old language, 500 steps on: the new corpus as it is; the part of a larger one
that a trigram model of reference text finds likeliest (as many documents); a quarter of that, four epochs; all of it
with 30 % old data. Losses in nats. The regime is that of the method's text; nothing was chosen. The new language's loss
shows no dip before it falls in this regime, and none is claimed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.continual_pretraining import continue_training, rewarm
from w2s_fast.methods.streams.quality_continual import Ngram, quality_filter
from w2s_fast.optim import RewarmCosineLR

from .. import markov
from ..protocol import Claim

TOKENS, STEPS, BATCH, PEAK, LENGTH, JUNK, REPLAY = 24, 500, 128, 3e-3, 50, 0.4, 0.3
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
    rows = torch.randint(TOKENS, (documents, LENGTH), generator=draw)
    junk = torch.rand(documents, generator=draw) < JUNK
    clean = rows.clone()
    for at in range(2, LENGTH):
        clean[:, at] = torch.multinomial(table[clean[:, at - 2], clean[:, at - 1]], 1, generator=draw)[:, 0]
    return torch.where(junk[:, None], rows, clean), junk


def pairs(rows: Tensor) -> TensorDataset:
    """Contexts and next tokens of documents."""
    windows = rows.unfold(1, 3, 1).reshape(-1, 3)
    return TensorDataset(windows[:, :2], windows[:, 2])


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    old_table = markov.language(TOKENS, 10 * seed)
    new_table = markov.language(TOKENS, 10 * seed + 1, like=old_table, shared=0.5)
    old = markov.text(old_table, STEPS * BATCH, 10 * seed + 2)
    tests = {"old": markov.text(old_table, 8192, 10 * seed + 3), "new": markov.text(new_table, 8192, 10 * seed + 4)}
    model = markov.Model(TOKENS, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    fit(model, markov.batches(old, BATCH, STEPS, seed), optimizer, clip=1.0,
        scheduler=RewarmCosineLR(optimizer, warmup=5, total=STEPS))  # fmt: skip
    count = -(-STEPS * BATCH // (LENGTH - 2))
    whole, _ = corpus(new_table, count, 10 * seed + 5)
    larger, junk = corpus(new_table, round(count / (1 - JUNK) * 1.03), 10 * seed + 6)
    reference, bad = corpus(new_table, 200, 10 * seed + 7)
    scorer = Ngram(reference[~bad].tolist(), TOKENS)
    losses = torch.tensor([scorer.loss(ids) for ids in larger.tolist()])
    kept = quality_filter(losses, count / len(larger))
    arms = {
        "junk": (whole, 1, 0.0), "selected": (larger[kept], 1, 0.0),
        "quarter, four epochs": (larger[kept[::4]], 4, 0.0), "selected, 30 % old": (larger[kept], 1, REPLAY),
    }  # fmt: skip
    found = {"base": {name: markov.loss_on(model, test) for name, test in tests.items()}}
    for arm, (rows, epochs, replay) in arms.items():
        own = copy.deepcopy(model)
        again = torch.optim.AdamW(own.parameters(), lr=PEAK)
        part = pairs(rows)
        size = STEPS // epochs * (BATCH - round(replay * BATCH))
        continue_training(own, TensorDataset(*part[:size]), TensorDataset(*old), again, replay=replay, batch_size=BATCH,
                          epochs=epochs, schedule=rewarm(), seed=seed)  # fmt: skip
        found[arm] = {name: markov.loss_on(own, test) for name, test in tests.items()}
    found["selected"]["junk kept"] = junk[kept].float().mean().item()
    return found
