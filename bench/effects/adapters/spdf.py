"""SPDF (arXiv 2303.10464): pre-trained with 75 % of the weights at 0, fine-tuned with all of them.

A Llama of width 48 (`bench.effects.adapted`) learns docstrings from random weights for 160 steps, dense or under a
random mask, then code for 60: all weights, or those of the mask. Both rates are chosen on dev: that of pre-training by
the docstrings, that of fine-tuning by the code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.adapters import spdf
from w2s_fast.methods.sparse_lowrank.sltrain import train_blocks

from .. import adapted, llama
from ..adapted import LENGTH
from ..protocol import Choice, Claim, choose

SPARSITY, STEPS, TUNING, RATES = 0.75, 160, 60, (3e-3, 1e-2, 3e-2)
ARMS = {"dense": 0.0, "sparse, dense tuning": SPARSITY, "sparse, sparse tuning": SPARSITY}
CLAIMS = [
    Claim("dense fine-tuning beats sparse", "code", "sparse, dense tuning", "sparse, sparse tuning", 0.0, "lower"),
    Claim("it is at most 0.05 nats behind dense pre-training", "code", "sparse, dense tuning", "dense", -0.05, "lower"),
]


def recipe(steps: int, rate: float, seed: int) -> Recipe:
    return Recipe(steps, rate, batch=4, warmup=0.1, floor=0.1, seed=seed)


@lru_cache(maxsize=32)
def pretrained(sparsity: float, seed: int, rate: float) -> Any:
    model = adapted.untrained(seed)
    how = recipe(STEPS, rate, seed)
    if sparsity:
        spdf.train(model, None, adapted.rows("general"), recipe=how, sparsity=sparsity, length=LENGTH)
    else:
        train_blocks(model, adapted.blocks("general"), how)
    return model.eval()


def tuned(arm: str, seed: int, first: float, rate: float) -> Any:
    model = llama.clone(pretrained(ARMS[arm], seed, first))
    if arm == "sparse, sparse tuning":
        spdf.train(model, None, adapted.rows("code"), recipe=recipe(TUNING, rate, seed), sparsity=0.0, length=LENGTH)
    else:
        spdf.finetune(model, None, adapted.rows("code"), recipe=recipe(TUNING, rate, seed), length=LENGTH)
    return model


def choices() -> dict[str, Choice]:
    found = {}
    for stage, sparsity in (("dense pre-training", 0.0), ("sparse pre-training", SPARSITY)):
        found[stage] = choose(lambda rate, seed, on, s=sparsity: adapted.loss(pretrained(s, seed, rate), "general", on),
                              {"rate": RATES}, better="lower")  # fmt: skip
    for arm, sparsity in ARMS.items():
        first = found["sparse pre-training" if sparsity else "dense pre-training"].best["rate"]
        found[arm] = choose(lambda rate, seed, on, a=arm, f=first: adapted.loss(tuned(a, seed, f, rate), "code", on),
                            {"rate": RATES}, better="lower")  # fmt: skip
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for arm, sparsity in ARMS.items():
        first = chosen["sparse pre-training" if sparsity else "dense pre-training"]["rate"]
        before, after = pretrained(sparsity, seed, first), tuned(arm, seed, first, chosen[arm]["rate"])
        found[arm] = {"docstrings before": adapted.loss(before, "general", "test"),
                      "code": adapted.loss(after, "code", "test"),
                      "docstrings": adapted.loss(after, "general", "test")}  # fmt: skip
    return found
