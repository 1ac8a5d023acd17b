"""FerKD (arXiv 2308.11473): stored soft labels of crops, where most crops miss the object.

Crops of 8 x 8 digits have no background, so no crop misleads. Here a digit lies somewhere in a scene of 20 x 20 with
clutter (parts of other digits), and crops have 0.3 to 0.7 of its side: most are without the digit. A larger network
that has learned from whole digits in scenes is the teacher. Percent of wrong digits in whole test scenes after the same
steps on the same crops with hard labels, with every stored soft label (FKD), and with those of which the teacher is not
sure left out. The rate is chosen for each arm on dev, of FerKD the threshold too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.distillation import ferkd

from ..data import Split, digits
from ..pictures import error, network, taught
from ..protocol import Choice, Claim, choose

SIDE, CROPS, STEPS, TEACHER = 20, 8, 600, 1200
GRIDS = {
    "hard labels": {"rate": (1e-3, 3e-3)}, "FKD": {"rate": (1e-3, 3e-3)},
    "FerKD": {"rate": (1e-3, 3e-3), "discard": (0.3, 0.5)},
}  # fmt: skip
FULL = {"STEPS": 2400, "GRIDS": {
    "hard labels": {"rate": (1e-3, 3e-3, 1e-2)}, "FKD": {"rate": (1e-3, 3e-3, 1e-2)},
    "FerKD": {"rate": (1e-3, 3e-3, 1e-2), "discard": (0.2, 0.3, 0.5, 0.7)},
}}  # fmt: skip
CLAIMS = [
    Claim("stored soft labels beat hard ones", "error", "FKD", "hard labels", 0.0, "lower"),
    Claim("leaving out the crops that mislead helps", "error", "FerKD", "FKD", 0.0, "lower"),
]


def scenes(split: Split, seed: int) -> Split:
    """A digit of each picture somewhere among six 4 x 4 parts of others: ``[N, 1, 20, 20]``."""
    draw = torch.Generator().manual_seed(seed)
    x, made = split.x.view(-1, 8, 8), torch.zeros(len(split.y), SIDE, SIDE)
    for i, canvas in enumerate(made):
        for _ in range(6):
            other = x[int(torch.randint(len(x), (), generator=draw))]
            part = torch.randint(5, (2,), generator=draw).tolist()
            at = torch.randint(SIDE - 3, (2,), generator=draw).tolist()
            canvas[at[0] : at[0] + 4, at[1] : at[1] + 4] = other[part[0] : part[0] + 4, part[1] : part[1] + 4]
        row, column = torch.randint(SIDE - 7, (2,), generator=draw).tolist()
        canvas[row : row + 8, column : column + 8] = x[i]
    return Split(made[:, None], split.y)


@lru_cache(maxsize=8)
def prepared(seed: int) -> tuple[nn.Module, Split, ferkd.Stored, dict[str, Split]]:
    """The teacher, training scenes, its labels of their crops, dev and test scenes."""
    parts = digits(seed)
    train = scenes(parts["train"], seed)
    teacher = taught(network(16, 100 + seed, SIDE), train, Recipe(TEACHER, 3e-3, batch=64, clip=None, seed=seed),
                     moved=False)  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    stored = ferkd.store(teacher, train.x, CROPS, draw, top=3, least=0.3, most=0.7)
    return teacher, train, stored, {name: scenes(parts[name], 1 + seed) for name in ("dev", "test")}


def run(arm: str, seed: int, on: str, rate: float, discard: float = 0.0) -> float:
    _, train, stored, held = prepared(seed)
    labels = stored
    if arm == "FerKD":
        labels = ferkd.calibrated(stored, train.y, 10, discard=discard, uncertain=discard)
    elif arm == "hard labels":
        sure = torch.zeros(len(stored.picture), 1)
        labels = stored._replace(ids=train.y[stored.picture][:, None], logp=sure)
    student = network(8, seed, SIDE)
    recipe = Recipe(STEPS, rate, batch=64, clip=None, seed=seed)
    ferkd.train_stored(student, train.x, labels, recipe=recipe, mix=False)
    return error(student, held[on])


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda arm=arm, **setting: run(arm, **setting), grid, better="lower")
            for arm, grid in GRIDS.items()}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    teacher, _, stored, held = prepared(seed)
    sure = stored.logp[:, 0].exp()
    found: dict[str, dict[str, float]] = {"teacher": {
        "error": error(teacher, held["test"]), "share of crops below 0.5": (sure < 0.5).float().mean().item(),
    }}  # fmt: skip
    return found | {arm: {"error": run(arm, seed, "test", **chosen[arm])} for arm in GRIDS}
