"""Continual pre-training on selected data (arXiv 2406.14833) of a small transformer: code among generated tables.

A Llama of two layers over bytes learns the standard library's prose for 200 steps of 16 blocks, then 100 steps of: a
corpus of 256-byte documents of code, 40 % of which are parts of the encoding tables; the part of a larger one that a
trigram model of 100 documents of code finds likeliest (as many documents); a quarter of that, four epochs; all of it
with 30 % prose. Nats a byte on modules that gave no training text. The peak rate is chosen on dev for the whole
corpus, the baseline, and serves all arms.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams.continual_pretraining import continue_training, rewarm
from w2s_fast.methods.streams.quality_continual import Ngram, quality_filter

from .. import transformer
from ..protocol import Choice, Claim, choose

METHOD = "quality_continual"
STEPS, DOCUMENT, JUNK, REPLAY = 100, 256, 0.4, 0.3
DOCUMENTS = STEPS * transformer.BATCH * transformer.LENGTH // DOCUMENT
RATES = (2e-3, 5e-3, 1.2e-2)
CLAIMS = [
    Claim("selected documents beat the whole corpus on code", "code", "selected", "whole", 0.0, "lower"),
    Claim("a quarter of them, four epochs, is within 0.08 nats a byte", "code", "quarter, four epochs", "selected",
          -0.08, "lower"),
    Claim("30 % prose lowers the loss on prose", "prose", "selected, 30 % prose", "selected", 0.0, "lower"),
    Claim("and costs at most 0.15 on code", "code", "selected, 30 % prose", "selected", -0.15, "lower"),
    Claim("the trigram model leaves at most 1 % tables", "tables kept", "selected", 0.01, 0.0, "lower"),
]  # fmt: skip


def corpus(count: int, junk: float, seed: int) -> tuple[Tensor, Tensor]:
    """Documents ``[count, DOCUMENT]`` of code and of tables, and which are tables."""
    draw = torch.Generator().manual_seed(seed)
    bad = torch.rand(count, generator=draw) < junk
    code = transformer.blocks(transformer.parts()["code", "train"], count, seed, DOCUMENT)
    return torch.where(bad[:, None], transformer.blocks(transformer.tables(), count, seed + 1, DOCUMENT), code), bad


class Prepared(NamedTuple):
    """Of a seed: the model that learned prose, the corpora, and the share of tables among what was selected."""

    base: Any
    corpora: dict[str, Tensor]
    tables: float


@lru_cache(maxsize=3)
def prepared(seed: int) -> Prepared:
    """The selected corpus has as many documents as the whole one, the likeliest of a larger one."""
    whole, _ = corpus(DOCUMENTS, JUNK, 100 * seed)
    larger, bad = corpus(round(1.03 * DOCUMENTS / (1 - JUNK)), JUNK, 100 * seed + 10)
    scorer = Ngram(corpus(100, 0.0, 100 * seed + 20)[0].tolist(), transformer.VOCABULARY)
    kept = quality_filter(torch.tensor([scorer.loss(ids) for ids in larger.tolist()]), DOCUMENTS / len(larger))
    tables = bad[kept].float().mean().item()
    return Prepared(transformer.pretrained(seed), {"whole": whole, "selected": larger[kept]}, tables)


def run(arm: str, rate: float, seed: int, on: str, share: int = 1, replay: float = 0.0) -> dict[str, float]:
    """A ``share``-th of the documents, as many epochs."""
    base, corpora, _ = prepared(seed)
    own, old = copy.deepcopy(base), transformer.blocks(transformer.parts()["prose", "train"], 2000, 100 * seed + 30)
    size = STEPS // share * (transformer.BATCH - round(replay * transformer.BATCH))
    new = corpora[arm][::share].reshape(-1, transformer.LENGTH)[:size]
    continue_training(own, TensorDataset(new), TensorDataset(old), transformer.adamw(own, rate), replay=replay,
                      batch_size=transformer.BATCH, epochs=share, schedule=rewarm(warmup=0.02),
                      loss=transformer.loss, seed=seed)  # fmt: skip
    return transformer.evaluated(own, on)


def choices() -> dict[str, Choice]:
    def dev(rate: float, seed: int, on: str) -> float:
        return run("whole", rate, seed, on)["code"]

    return {"whole": choose(dev, {"rate": RATES}, better="lower")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    rate = chosen["whole"]["rate"]
    return {
        "whole": run("whole", rate, seed, "test"),
        "selected": {**run("selected", rate, seed, "test"), "tables kept": prepared(seed).tables},
        "quarter, four epochs": run("selected", rate, seed, "test", share=4),
        "selected, 30 % prose": run("selected", rate, seed, "test", replay=REPLAY),
    }
