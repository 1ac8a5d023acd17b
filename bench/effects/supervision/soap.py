"""SOAP classification (arXiv 2211.14539): sections learned from headings, and what they are worth in another hospital.

Notes are sequences of 5 sections in a usual order, 2 to 6 sentences each; a sentence's vector is a digit of the class
of its section (0 to 4) with noise: sentences alone are ambiguous, their order tells more. Headings label the training
notes of one hospital; a fifth of them is missing, so that a section passes for a part of the one before. The other
hospital's pictures are mirrored, and 4 labelled notes of it are known. Percent of sentences right on test notes:
BiLSTM-CRF and a classifier of single sentences on the weak labels; in the other hospital the transferred tagger, before
and after fine-tuning, and one from scratch. The rate is chosen on dev.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.supervision.soap import Tagger, collate, fit, weak_labels

from ..data import digits
from ..protocol import Choice, Claim, choose

LABELS, NOTES, FEW, NOISE, MISSING, STEPS, RATES = 5, 60, 4, 0.8, 0.2, 80, (3e-3, 1e-2, 3e-2)
FULL = {"RATES": (1e-3, 3e-3, 1e-2, 3e-2, 0.1)}
CLAIMS = [
    Claim("the tagger beats a classifier of single sentences by 5 points", "right", "tagger", "sentences", 5.0),
    Claim("it beats the headings that it learned from", "right", "tagger", "headings"),
    Claim("other hospital: transfer beats training from scratch by 5 points", "right", "transferred", "scratch", 5.0),
    Claim("other hospital: fine-tuning beats the tagger as it is", "right", "transferred", "untouched"),
]
Note = tuple[Tensor, Tensor]


def notes(seed: int, part: str, count: int, mirrored: bool, weak: bool) -> tuple[list[Note], float]:
    """Vectors with labels, true or of headings; and the share of the headings' labels that are right."""
    split = digits(seed)[part]
    draw = torch.Generator().manual_seed(10 * seed + 3 * ("train", "dev", "test").index(part) + mirrored)
    found, right, total = [], 0, 0
    for _ in range(count):
        order = [k for k in range(LABELS) if k == 0 or torch.rand((), generator=draw) < 0.85]
        if len(order) > 2 and torch.rand((), generator=draw) < 0.2:
            order[1], order[2] = order[2], order[1]
        truth, lines = list[int](), list[str]()
        for i, label in enumerate(order):
            size = int(torch.randint(2, 7, (), generator=draw))
            headed = i == 0 or float(torch.rand((), generator=draw)) > MISSING
            truth += [label] * size
            lines += [f"section {label}" if headed else "", *[""] * (size - 1)]
        guessed = weak_labels(lines, {f"section {label}": label for label in range(LABELS)})
        rows = [(split.y == label).nonzero()[:, 0] for label in truth]
        pick = torch.stack([row[torch.randint(len(row), (), generator=draw)] for row in rows])
        x = split.x[pick].view(-1, 8, 8)
        x = (x.flip(2) if mirrored else x).flatten(1)
        x = x + NOISE * torch.randn(x.shape, generator=draw)
        right, total = right + sum(a == b for a, b in zip(truth, guessed, strict=True)), total + len(truth)
        found.append((x, torch.tensor(guessed if weak else truth)))
    return found, right / total


def share(predicted: list[list[int]], held: list[Note]) -> float:
    """Percent of the sentences."""
    hits = [torch.tensor(row) == y for row, (_, y) in zip(predicted, held, strict=True)]
    return 100 * torch.cat(hits).double().mean().item()


def tagged(tagger: Tagger, held: list[Note]) -> float:
    vectors, _, lengths = collate(held)
    return share(tagger.eval().predict(vectors, lengths), held)


def fresh(seed: int) -> Tagger:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tagger(64, LABELS, hidden=24)


@lru_cache(maxsize=64)
def weakly(rate: float, seed: int) -> Tagger:
    tagger = fresh(seed)
    fit(tagger, notes(seed, "train", NOTES, False, True)[0], recipe=Recipe(STEPS, rate, batch=12, clip=1.0, seed=seed))
    return tagger


def sentences(rate: float, seed: int, held: list[Note]) -> float:
    """A network of single sentences, on the same labels."""
    x, y = (torch.cat(part) for part in zip(*notes(seed, "train", NOTES, False, True)[0], strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, LABELS))
    draw = torch.Generator().manual_seed(seed)

    def loss(model: Any, _: int) -> Tensor:
        rows = torch.randint(len(y), (192,), generator=draw)
        return F.cross_entropy(model(x[rows]), y[rows])

    train(model, loss, range(100), Recipe(2 * STEPS, rate, clip=None))
    with torch.no_grad():
        return share([model(v).argmax(1).tolist() for v, _ in held], held)


def run(arm: str, rate: float, seed: int, on: str) -> float:
    away = arm in ("transferred", "scratch", "untouched")
    held = notes(seed, on, 60, away, False)[0]
    if arm == "sentences":
        return sentences(rate, seed, held)
    if arm in ("tagger", "untouched"):
        return tagged(weakly(rate, seed), held)
    tagger = fresh(seed) if arm == "scratch" else copy.deepcopy(weakly(1e-2, seed))
    few = notes(seed, "train", FEW, True, False)[0]
    fit(tagger, few, recipe=Recipe(STEPS // 2, rate, batch=FEW, clip=1.0, seed=seed))
    return tagged(tagger, held)


ARMS = ("tagger", "sentences", "transferred", "scratch", "untouched")


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: {"right": run(arm, chosen[arm]["rate"], seed, "test")} for arm in ARMS}
    return {**found, "headings": {"right": 100 * notes(seed, "test", 60, False, True)[1]}}
