"""FerKD (arXiv 2308.11473): stored soft labels of crops, where most crops miss the object.

Crops of 8 x 8 digits have no background, so no crop misleads. Here a digit lies somewhere in a scene of 20 x 20 with
clutter (parts of other digits), and crops have 0.3 to 0.7 of its side: most are without the whole digit. The teacher, a
larger network, has learned from many such crops of four times as many scenes. Percent of wrong digits in crops of 0.7
of unseen scenes that hold the digit, after the same steps on the same stored crops with hard labels, with every stored
soft label (FKD), and with those left out of which the teacher is not sure. The rate is chosen for each arm on dev;
FerKD's threshold was, 0.5 before 0.3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.distillation import ferkd

from ..data import Split, digits
from ..pictures import error
from ..protocol import Choice, Claim, choose

SIDE, CROPS, STEPS, TEACHER, COPIES = 20, 8, 400, 1200, 4
LEAST, MOST, RATES = 0.3, 0.7, (3e-3, 1e-2)
GRIDS = {"hard labels": {"rate": RATES}, "FKD": {"rate": RATES}, "FerKD": {"rate": RATES, "discard": (0.5,)}}
FULL = {"STEPS": 2400, "TEACHER": 6000, "GRIDS": {
    "hard labels": {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}, "FKD": {"rate": (1e-3, 3e-3, 1e-2, 3e-2)},
    "FerKD": {"rate": (1e-3, 3e-3, 1e-2, 3e-2), "discard": (0.2, 0.3, 0.5, 0.7)},
}}  # fmt: skip
CLAIMS = [
    Claim("stored soft labels beat hard ones", "error", "FKD", "hard labels", 0.0, "lower"),
    Claim("leaving out the crops that mislead helps", "error", "FerKD", "FKD", 0.0, "lower"),
]


class Scenes(NamedTuple):
    """Pictures ``[N, 1, 20, 20]``, classes, and where the digit begins: row and column ``[N, 2]``."""

    x: Tensor
    y: Tensor
    corner: Tensor


def scenes(split: Split, seed: int, copies: int = 1) -> Scenes:
    """A digit of each picture somewhere over six 4 x 4 parts of others."""
    draw = torch.Generator().manual_seed(seed)
    x, y = split.x.view(-1, 8, 8).repeat(copies, 1, 1), split.y.repeat(copies)
    count, made = len(y), torch.zeros(len(y), SIDE, SIDE)
    every = torch.arange(count)[:, None, None]

    def paste(part: Tensor, corner: Tensor) -> None:
        size = torch.arange(part.shape[1])
        made[every, (corner[:, :1] + size)[:, :, None], (corner[:, 1:] + size)[:, None]] = part

    for _ in range(6):
        other, at = torch.randint(count, (count, 1, 1), generator=draw), torch.randint(5, (count, 2), generator=draw)
        rows, columns = (at[:, i : i + 1] + torch.arange(4) for i in range(2))
        paste(x[other, rows[:, :, None], columns[:, None]], torch.randint(SIDE - 3, (count, 2), generator=draw))
    corner = torch.randint(SIDE - 7, (count, 2), generator=draw)
    paste(x, corner)
    return Scenes(made[:, None], y, corner)


def held_out(split: Split, seed: int) -> Split:
    """Crops of 0.7 of a scene's side that hold the whole digit, resized as all crops are."""
    found, draw = scenes(split, seed), torch.Generator().manual_seed(seed)
    half = MOST * SIDE / 2
    low, high = (found.corner + 8 - half).clamp_min(half), (found.corner + half).clamp_max(SIDE - half)
    centre = low + (high - low) * torch.rand(low.shape, generator=draw)
    box = torch.cat((centre.flip(1) * 2 / SIDE - 1, torch.full(low.shape, MOST)), 1)  # column before row
    return Split(ferkd.crop(found.x, box), found.y)


def network(width: int, seed: int) -> nn.Sequential:
    """Four convolutions and the largest value of each channel: a digit counts the same wherever it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2),
                                      (4 * width, 4 * width, 1)):  # fmt: skip
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


@lru_cache(maxsize=8)
def prepared(seed: int) -> tuple[nn.Module, Scenes, ferkd.Stored, dict[str, Split]]:
    """The teacher, training scenes, its labels of their crops, dev and test."""
    parts, draw = digits(seed), torch.Generator().manual_seed(seed)
    many, teacher = scenes(parts["train"], 1000 + seed, COPIES), network(12, 100 + seed)

    def loss(model: nn.Module, _: int) -> Tensor:
        rows = torch.randint(len(many.y), (64,), generator=draw)
        return nn.functional.cross_entropy(
            model(ferkd.crop(many.x[rows], ferkd.boxes(64, LEAST, draw, MOST))), many.y[rows]
        )

    train(teacher, loss, range(TEACHER), Recipe(TEACHER, 3e-3, clip=None, seed=seed))
    own = scenes(parts["train"], seed)
    stored = ferkd.store(teacher, own.x, CROPS, draw, top=5, least=LEAST, most=MOST)
    return teacher, own, stored, {name: held_out(parts[name], 1 + seed) for name in ("dev", "test")}


def run(arm: str, seed: int, on: str, rate: float, discard: float = 0.0) -> float:
    _, own, stored, held = prepared(seed)
    labels = stored
    if arm == "FerKD":
        labels = ferkd.calibrated(stored, own.y, 10, discard=discard, uncertain=discard)
    elif arm == "hard labels":
        sure = torch.zeros(len(stored.picture), 1)
        labels = stored._replace(ids=own.y[stored.picture][:, None], logp=sure)
    student = network(8, seed)
    recipe = Recipe(STEPS, rate, batch=64, clip=None, seed=seed)
    ferkd.train_stored(student, own.x, labels, recipe=recipe, mix=False)
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
