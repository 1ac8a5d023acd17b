"""Samples of `projected_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _state(m: Make, rows: int, columns: int, rank: int, right: bool, layout: str) -> tuple[Tensor, ...]:
    """p, G, P and moments whose second is far from 0, where the direction's error would be that of the division."""

    def draw(*shape: int) -> Tensor:
        if layout == "sliced":
            return m.logits(shape[0] + 1, shape[1] + 5, scale=1.0)[1:, 3:-2]
        if layout == "transposed":
            return m.logits(*shape[::-1], scale=1.0).t()
        return m.logits(*shape, scale=1.0)

    p, grad = draw(rows, columns), draw(rows, columns)
    side, state = (columns, (rows, rank)) if right else (rows, (rank, columns))
    wide = torch.float64 if m.dtype == torch.float64 else torch.float32
    basis = torch.linalg.qr(draw(side, rank).to(wide))[0]
    first, second = draw(*state).to(wide), draw(*state).to(wide).square() + 0.5
    return p, grad, basis, first, second


def _step(
    rows: int, columns: int, rank: int, right: bool = True, layout: str = "plain", before: float | None = None,
    **options: Any,
) -> Callable[[Make], Inputs]:  # fmt: skip
    def make(m: Make) -> Inputs:
        given: dict[str, Any] = {"step": 3, "lr": 0.1, "right": right, **options}
        state = _state(m, rows, columns, rank, right, layout)
        if before is not None:
            given["previous"] = torch.tensor(before, device=m.device)
        return state, given

    return make


def _sample(name: str, make: Callable[[Make], Inputs]) -> Sample:
    return Sample("projected_step", name, make, grad=False)


SAMPLES = [
    _sample("galore", _step(13, 9, 4)),
    _sample("galore-left", _step(9, 37, 4, right=False, weight_decay=0.1)),
    _sample("column", _step(37, 21, 5, outside="column", before=1e-3)),
    _sample("column-left", _step(21, 300, 5, right=False, outside="column", before=1e-3, weight_decay=0.1)),
    _sample("column-first", _step(70, 33, 17, outside="column")),
    _sample("column-no-limit", _step(70, 33, 17, outside="column", before=1e-3, limit=None)),
    _sample("column-below-limit", _step(70, 33, 17, outside="column", before=1e6)),
    _sample("matrix", _step(37, 21, 5, outside="matrix", before=1.0)),
    _sample("matrix-left", _step(21, 37, 5, right=False, outside="matrix")),
    _sample("large-scale", _step(37, 21, 5, outside="column", scale=6.0)),
    _sample("whole-rank", _step(12, 7, 7, outside="column", scale=0.5)),
    _sample("sliced", _step(37, 21, 5, layout="sliced", outside="column")),
    _sample("transposed", _step(37, 21, 5, layout="transposed", outside="column")),
    _sample("one", _step(1, 1, 1, outside="matrix")),
    _sample("no-rows", _step(0, 9, 4, outside="column")),
]
