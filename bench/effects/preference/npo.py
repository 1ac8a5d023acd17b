"""Negative preference optimization (NPO, arXiv 2404.05868): forgetting without collapse, against gradient ascent.

A model of general text is fine-tuned on pieces of Python modules; 64 of them shall be forgotten, 256 kept. The goal is
the model that never saw the forget set: forget quality is the p-value of the Kolmogorov-Smirnov test that both models'
truth ratios have one distribution; utility the harmonic mean of the token probabilities of the retained pieces, of
unseen modules and of general text. 64 steps of 16, beta 0.1 (the paper's). The rate of each kind and the weight of its
retained pieces are chosen on other draws, by the highest forget quality on the way plus the utility at the end.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from w2s_fast.methods._common import language, loop
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods.preference import npo

from .. import llama, sequences, text, tokens
from ..protocol import Choice, Claim, choose

VOCABULARY, SIZE, LENGTH, PROMPT, STEPS = 512, llama.Size(64, 2, 2), 48, 16, 64
ARMS = {"gradient ascent": ("ga", False), "NPO": ("npo", False), "gradient ascent + retain": ("ga", True),
        "NPO + retain": ("npo", True)}  # fmt: skip
GRID = {"rate": (2e-4, 4e-4), "weight": (0.05, 0.2)}
FULL = {"GRID": {"rate": (1e-4, 2e-4, 4e-4, 8e-4), "weight": (0.05, 0.2, 1.0)}}
CLAIMS = [
    Claim("NPO keeps more utility than gradient ascent", "utility at the end", "NPO", "gradient ascent"),
    Claim("so it does with retained pieces", "utility at the end", "NPO + retain", "gradient ascent + retain"),
    Claim("NPO with retained pieces is nearer to the model that never saw them on the way",
          "highest forget quality", "NPO + retain", "gradient ascent + retain"),
]  # fmt: skip


@lru_cache(maxsize=1)
def base() -> Any:
    """Of general text, from the cache; the same for all seeds."""
    recipe = [text.fingerprint(), torch.__version__, VOCABULARY, SIZE, LENGTH]

    def make() -> Any:
        ids = tokens.stream(tokens.tokenizer(VOCABULARY), "general", "train")
        model = llama.llama(SIZE, VOCABULARY, seed=0)
        llama.fit_language(model, ids, 300, 0.04, batch=24, length=LENGTH)
        return model

    return llama.kept_model("effects-text-base", recipe, make)


@lru_cache(maxsize=1)
def streams() -> list[Any]:
    """Code of modules, of unseen modules, and unseen general text."""
    tok = tokens.tokenizer(VOCABULARY)
    return [tokens.stream(tok, "code", "train", 400_000), tokens.stream(tok, "code", "valid", 100_000),
            tokens.stream(tok, "general", "valid", 100_000)]  # fmt: skip


@lru_cache(maxsize=8)
def prepared(seed: int) -> dict[str, Any]:
    """The pieces, the model that has seen all, and what the one without the forget set scores."""
    (code, unseen, general), draw = streams(), torch.Generator().manual_seed(seed)
    pieces = llama.windows(code, 320, LENGTH, draw)
    elsewhere = llama.windows(unseen, 64, LENGTH, draw)
    wrong = torch.cat((pieces[:64, :PROMPT], elsewhere[:, PROMPT:]), 1)
    found = {
        "forget": sequences.whole(pieces[:64], 1), "retain": sequences.whole(pieces[64:], 1),
        "true": sequences.whole(pieces[:64], PROMPT), "wrong": sequences.whole(wrong, PROMPT),
        "others": [sequences.whole(llama.windows(ids, 128, LENGTH, draw), 1) for ids in (unseen, general)],
    }  # fmt: skip
    models = []
    for part in (found["forget"] + found["retain"], found["retain"]):
        copy, steps = llama.clone(base()), 12 * len(part) // 32
        loader = shuffled(part, 32, seed=seed, collate=language.collate)
        loop.train(copy, language.cross_entropy, loader, llama.recipe(steps, 0.01))
        models.append(copy.eval())
    return {**found, "model": models[0], "goal": npo.truth_ratios(models[1], found["true"], found["wrong"])}


def run(arm: str, rate: float, weight: float, seed: int) -> dict[str, float]:
    kind, keeps = ARMS[arm]
    given, quality = prepared(seed), []
    model = llama.clone(given["model"])

    def place(step: int) -> None:
        if step % 10 == 0:
            ratios = npo.truth_ratios(model, given["true"], given["wrong"])
            quality.append(npo.forget_quality(ratios, given["goal"]))

    steps = []

    def tick(value: float) -> None:
        steps.append(value)
        place(len(steps))

    retain = [e._asdict() for e in given["retain"]] if keeps else None
    recipe = loop.Recipe(STEPS, rate, batch=16, schedule="constant", warmup=0.05, clip=None, decay=0.01, seed=seed)
    npo.train(model, None, [e._asdict() for e in given["forget"]], retain, recipe=recipe, kind=kind, beta=0.1,
              weight=weight, tick=tick)  # fmt: skip
    nats = [-language.scores(model, part, "mean").mean().item() for part in (given["retain"], *given["others"])]
    return {"highest forget quality": max(quality), "utility at the end": len(nats) / sum(math.exp(x) for x in nats)}


def choices() -> dict[str, Choice]:
    def dev(arm: str, grid: dict[str, tuple[float, ...]]) -> Choice:
        return choose(lambda seed, on, **setting: sum(run(arm, seed=seed, **setting).values()), grid)

    found: dict[str, Choice] = {}
    for arm, (_, keeps) in ARMS.items():
        rates = (found[arm.removesuffix(" + retain")].best["rate"],) if keeps else GRID["rate"]
        found[arm] = dev(arm, {"rate": rates, "weight": GRID["weight"] if keeps else (0.0,)})
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, seed=seed, **chosen[arm]) for arm in ARMS}
