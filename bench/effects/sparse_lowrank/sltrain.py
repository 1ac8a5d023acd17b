"""SLTrain (arXiv 2406.02214): low rank plus sparse against dense and low rank alone, pre-trained on text.

A LLaMA of width 32 and two layers (rank 8, density 0.03, alpha / rank 1 / 4) on the text of Python's standard library,
360 steps of 16 blocks of 64 tokens. Perplexity on held-out modules. The rate is chosen for each arm on dev, from one
grid (180 steps). The long form has width 64, rank 16 and 4,800 steps: the dense model is then trained to where
its loss hardly falls; here it is not, and a ratio to it is one at equal, few steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s_fast.files import write_tensors
from w2s_fast.methods._common import language
from w2s_fast.methods._common.cache import digest, kept
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.sparse_lowrank import sltrain
from w2s_fast.nn import model_size

from .. import llama, text, tokens
from ..protocol import Choice, Claim, choose

VOCABULARY, SIZE, RANK, LENGTH, STEPS = 512, llama.Size(32, 2, 2), 8, 64, 360
ARMS, RATES = ("dense", "low rank", "SLTrain"), (4e-3, 1e-2, 2.5e-2)
FULL = {"STEPS": 4800, "SIZE": llama.Size(64, 2, 2), "RANK": 16, "RATES": (1e-3, 2e-3, 4e-3, 1e-2, 2.5e-2)}
CLAIMS = [
    Claim("the sparse part helps: SLTrain beats low rank alone", "perplexity", "SLTrain", "low rank", 0.0, "lower"),
    Claim("within 5 % of dense", "ratio to dense", "SLTrain", 1.05, 0.0, "lower"),
]


@lru_cache(maxsize=1)
def ids() -> dict[str, Tensor]:
    """Streams of all three kinds of text; the held-out one in two halves."""

    def make(folder: Path) -> None:
        tok = tokens.tokenizer(VOCABULARY)
        for split, most in (("train", 600_000), ("valid", 60_000)):
            parts = [tokens.stream(tok, d, split, most) for d in ("general", "code", "prose")]
            write_tensors(folder / f"{split}.pt", torch.cat([p[: len(p) // LENGTH * LENGTH] for p in parts]))

    folder = kept("effects-sltrain-ids", digest(text.fingerprint(), VOCABULARY, LENGTH), make)
    loaded = (torch.load(folder / f"{split}.pt", weights_only=True) for split in ("train", "valid"))
    train, valid = (part.view(-1, LENGTH) for part in loaded)
    return {"train": train, "dev": valid[::2], "test": valid[1::2]}


def build(arm: str, seed: int) -> Any:
    """All three from the same dense model."""
    model = llama.llama(SIZE, VOCABULARY, seed, positions=LENGTH)
    if arm != "dense":
        density = 0.03 if arm == "SLTrain" else 0.0
        sltrain.convert(model, rank=RANK, density=density, alpha=RANK / 4, seed=seed)
    return model


def run(arm: str, rate: float, seed: int, on: str, steps: int) -> float:
    model = build(arm, seed)
    recipe = Recipe(steps, rate, batch=16, warmup=0.1, floor=0.1, seed=seed)
    sltrain.train_blocks(model, ids()["train"], recipe)
    rows = [language.Example(row[:1], row[1:]) for row in ids()[on][:400].tolist()]
    return math.exp(-language.scores(model, rows, "mean", 64).mean().item())


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on, STEPS // 2), {"rate": RATES},
                        better="lower") for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    made = {arm: run(arm, chosen[arm]["rate"], seed, "test", STEPS) for arm in ARMS}
    return {arm: {"perplexity": value, "ratio to dense": value / made["dense"],
                  "parameters": float(model_size(build(arm, seed)).parameters)}
            for arm, value in made.items()}  # fmt: skip
