"""Digits with classes of unequal size, and what happens to the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..robust import Parts, masks, parts


class Unequal(NamedTuple):
    """Training digits of S seeds, and the training counts of the classes ``[S, 10]``."""

    parts: Parts
    counts: Tensor


def unequal(seeds: Sequence[int], on: str, most: int = 80, ratio: float = 10.0) -> Unequal:
    """From ``most`` of one class down to ``most / ratio`` of another, in steps of one factor; the order by seed."""
    whole = parts(seeds, on, 1077)
    sizes = [max(1, round(most * ratio ** (-i / 9))) for i in range(10)]
    chosen, counts = [], torch.zeros(len(seeds), 10)
    for s, seed in enumerate(seeds):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(4000 + seed))
        rows = [(whole.y[s] == label).nonzero()[:size, 0] for label, size in zip(order.tolist(), sizes, strict=True)]
        chosen.append(torch.cat(rows))
        counts[s] = torch.bincount(whole.y[s][chosen[-1]], minlength=10)
    least = min(map(len, chosen))
    index = torch.stack([rows[:least] for rows in chosen])
    row = torch.arange(len(seeds))[:, None]
    return Unequal(Parts(whole.x[row, index], whole.y[row, index], whole.held_x, whole.held_y), counts)


def by_class(stack: object, x: Tensor, y: Tensor, eps: float) -> list[dict[str, float]]:
    """Of every model: percent right; robust; of the worst class and the worst three, robust."""
    ok, robust = masks(stack, x, y, eps)
    hot = torch.nn.functional.one_hot(y, 10).double()
    classes = (robust[..., None] * hot).sum(1) / hot.sum(1)
    worst = 100 * classes.sort(1).values
    rows = (100 * ok.double().mean(1), 100 * robust.double().mean(1), worst[:, 0], worst[:, :3].mean(1))
    names = ("right", "robust", "worst class", "worst three")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*rows, strict=True)]
