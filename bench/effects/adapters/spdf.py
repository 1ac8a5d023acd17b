"""SPDF (arXiv 2303.10464): pre-trained with 75 % of the weights at 0, fine-tuned with all of them.

A Llama of width 48 (`bench.effects.adapted`) learns docstrings from random weights for 400 steps, dense or under a
random mask, embedding and norms at 3e-3; then code for 100: all weights, or those of the mask. Both rates are chosen on
dev: that of pre-training by the docstrings, that of fine-tuning by the code. *Left* is the gap to dense pre-training
after fine-tuning, less half of the gap before; *forgotten* what fine-tuning costs on the docstrings. Bytes and seconds
are those of both stages (bytes of the larger one).
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from torch import nn

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import spdf
from w2s_fast.methods.sparse_lowrank.sltrain import train_blocks
from w2s_fast.optim import MaskedAdamW

from .. import adapted, llama
from ..adapted import LENGTH
from ..protocol import Choice, Claim, choose

SPARSITY, STEPS, TUNING, EMBEDDING = 0.75, 400, 100, 3e-3
SEEDS = range(10)
FIRST, SECOND = (1e-2, 3e-2), (3e-3, 1e-2, 3e-2)  # rates of pre-training's matrices, and of fine-tuning
ARMS = {"dense": 0.0, "sparse, dense tuning": SPARSITY, "sparse, sparse tuning": SPARSITY}
CLAIMS = [
    Claim("dense fine-tuning beats sparse by 0.04 nats", "loss", "sparse, dense tuning", "sparse, sparse tuning", 0.04,
          "lower"),
    Claim("it leaves less than half of the gap to dense pre-training", "left", "sparse, dense tuning", 0.0, 0.0,
          "lower"),
]  # fmt: skip


def recipe(steps: int, rate: float, seed: int) -> Recipe:
    return Recipe(steps, rate, batch=4, warmup=0.1, floor=0.1, seed=seed)


@lru_cache(maxsize=32)
def pretrained(sparsity: float, seed: int, rate: float) -> tuple[Any, dict[str, float]]:
    """The model, and what its training took."""
    model, start = adapted.untrained(seed), time.process_time()
    if sparsity:
        spdf.sparsify(model, sparsity, seed=seed)
    where = spdf.masks(model) if sparsity else {}

    def make(_: list[nn.Parameter], rate: float) -> MaskedAdamW:
        return MaskedAdamW(adapted.halves(model, rate, EMBEDDING), weight_decay=0.0, masks=where)

    done = train_blocks(model, adapted.blocks("general"), recipe(STEPS, rate, seed).but(optimizer=make))
    return model.eval(), adapted.costs(done, time.process_time() - start)


def tuned(arm: str, seed: int, first: float, rate: float) -> tuple[Any, dict[str, float]]:
    """The same of fine-tuning."""
    model, start = llama.clone(pretrained(ARMS[arm], seed, first)[0]), time.process_time()
    how: dict[str, Any] = {"recipe": recipe(TUNING, rate, seed), "length": LENGTH}
    if arm == "sparse, sparse tuning":
        done: Trained = spdf.train(model, None, adapted.rows("code"), sparsity=0.0, **how)
    else:
        done = spdf.finetune(model, None, adapted.rows("code"), **how)
    return model, adapted.costs(done, time.process_time() - start)


def choices() -> dict[str, Choice]:
    found = {}
    for stage, sparsity in (("dense pre-training", 0.0), ("sparse pre-training", SPARSITY)):
        found[stage] = choose(
            lambda rate, seed, on, s=sparsity: adapted.loss(pretrained(s, seed, rate)[0], "general", on),
            {"rate": FIRST}, better="lower",
        )  # fmt: skip
    for arm, sparsity in ARMS.items():
        first = found["sparse pre-training" if sparsity else "dense pre-training"].best["rate"]
        found[arm] = choose(lambda rate, seed, on, a=arm, f=first: adapted.loss(tuned(a, seed, f, rate)[0], "code", on),
                            {"rate": SECOND}, better="lower")  # fmt: skip
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for arm, sparsity in ARMS.items():
        first = chosen["sparse pre-training" if sparsity else "dense pre-training"]["rate"]
        (before, cost), (after, more) = pretrained(sparsity, seed, first), tuned(arm, seed, first, chosen[arm]["rate"])
        known = adapted.loss(before, "general", "test")
        found[arm] = adapted.columns(after, "code") | {name: max(cost[name], more[name]) for name in cost}
        found[arm]["seconds"] = cost["seconds"] + more["seconds"]
        found[arm] |= {"docstrings before": known, "forgotten": adapted.loss(after, "general", "test") - known}
    for one in found.values():
        gap, before = (one[name] - found["dense"][name] for name in ("loss", "docstrings before"))
        one["left"] = gap - before / 2
    return found
