"""GPICL (arXiv 2212.04458): a transformer that learns digits in context, meta-trained on few tasks or on ever new ones.

Digits of two classes on their first four principal components; a task is a random projection and a permutation of
the labels, a sequence 16 examples. A Llama of two layers (width 64) is meta-trained on 16 fixed tasks, or on new
tasks in every update. Measured on pictures that were not trained on: the share of right answers over the last six
examples, where chance is 0.5, of the 16 tasks and of new ones. Each arm's rate is chosen on dev, by what it is
trained for: its own tasks, or new ones.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from w2s_fast import checks
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.meta.gpicl import Learner, Tasks, accuracy, train

from ..data import digits
from ..protocol import Choice, Claim, choose

CLASSES, WIDTH, COMPONENTS, EXAMPLES, BATCH, STEPS = 2, 64, 4, 16, 16, 200
LATE, NEW = 6, 7_000_000  # examples at the end; a seed of tasks that no training has
RATES = (4e-3, 8e-3)
FULL = {"RATES": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "STEPS": 500}
ARMS = {"16 tasks": 16, "new tasks": 0}
CLAIMS = [
    Claim("trained on new tasks: 70 % of new tasks' late answers", "new", "new tasks", 0.7),
    Claim("trained on 16 tasks: 90 % of their late answers", "seen", "16 tasks", 0.9),
    Claim("and at most 60 % of new tasks' answers", "new", "16 tasks", 0.6, 0.0, "lower"),
    Claim("new tasks: late answers 5 points above the first two", "new", "new tasks", "new tasks, first", 0.05),
]


@lru_cache(maxsize=16)
def data(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Components by the training pictures' covariance."""
    parts = digits(seed)
    own = {name: (part.x[part.y < CLASSES], part.y[part.y < CLASSES]) for name, part in parts.items()}
    middle = own["train"][0].mean(0)
    _, _, axes = torch.linalg.svd(own["train"][0] - middle, full_matrices=False)
    return {name: ((x - middle) @ axes[:COMPONENTS].T, y) for name, (x, y) in own.items()}


def learner(seed: int) -> Learner:
    with checks.extra("demo"):
        from transformers import LlamaConfig, LlamaModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = LlamaModel(LlamaConfig(
            vocab_size=1, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=EXAMPLES, initializer_range=1 / WIDTH**0.5,
            bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip
        return Learner(body, COMPONENTS, CLASSES)


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    parts, model = data(seed), learner(seed)
    made = Tasks(*parts["train"], count=ARMS[arm], length=EXAMPLES, batch=BATCH, steps=STEPS, seed=seed)
    recipe = Recipe(STEPS, rate, batch=BATCH, optimizer="muon", schedule="linear", warmup=0.05, floor=0.02, seed=seed)
    train(model, made, recipe=recipe)
    found = {}
    for name, count, tasks in (("seen", 16, seed), ("new", 0, NEW + seed)):
        right = accuracy(model, Tasks(*parts[on], count=count, length=EXAMPLES, batch=64, seed=tasks), 8)
        found[name], found[f"{name}, first"] = right[-LATE:].mean().item(), right[:2].mean().item()
    return found


def choices() -> dict[str, Choice]:
    def score(arm: str, rate: float, seed: int, on: str) -> float:
        return run(arm, rate, seed, on)["seen" if ARMS[arm] else "new"]

    return {arm: choose(partial(score, arm), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for arm in ARMS:
        got = run(arm, chosen[arm]["rate"], seed, "test")
        found[arm] = {name: got[name] for name in ("seen", "new")}
        found[f"{arm}, first"] = {name: got[f"{name}, first"] for name in ("seen", "new")}
    return found
