"""Samples of `vandermonde_log`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _sums(shape: tuple[int, ...], length: int, layout: str = "plain", double: bool = False) -> Callable[[Make], Inputs]:
    """Powers that last and that fade; x in float64 where `double`."""

    def make(m: Make) -> Inputs:
        *_, features, states = shape
        if layout == "sliced":
            c = m.logits(*shape[:-1], shape[-1] + 2, 4, scale=0.5)[..., 1:-1, 1:3]
        elif layout == "transposed":
            c = m.logits(2, states, *shape[:-1], scale=0.5).movedim((1, 0), (-2, -1))
        else:
            c = m.logits(*shape, 2, scale=0.5)
        step = m.uniform(features, 1) * 0.1 + 0.001
        turns = torch.arange(states, device=step.device).expand(features, states) * torch.pi
        x = torch.stack((-0.5 * step.expand(features, states), turns * step), -1)
        return (c, x.double() if double else x.to(m.dtype), length), {}

    return make


SAMPLES = [
    Sample("vandermonde_log", "plain", _sums((3, 4), 70)),
    Sample("vandermonde_log", "one", _sums((1, 1), 1)),
    Sample("vandermonde_log", "row", _sums((2, 3), 64)),
    Sample("vandermonde_log", "channels", _sums((2, 2, 3, 5), 33)),
    Sample("vandermonde_log", "long", _sums((1, 33), 4200, double=True)),
    Sample("vandermonde_log", "sliced", _sums((2, 3, 4), 65, "sliced")),
    Sample("vandermonde_log", "transposed", _sums((2, 3, 4), 40, "transposed")),
    Sample("vandermonde_log", "no-features", _sums((0, 2), 6)),
    Sample("vandermonde_log", "no-channels", _sums((0, 2, 2), 6)),
]
