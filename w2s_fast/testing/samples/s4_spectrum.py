"""Samples of `s4_spectrum`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _space(
    channels: int, features: int, states: int, length: int, layout: str = "plain", double: bool = False
) -> Callable[[Make], Inputs]:
    """Poles on both sides of the real axis, some next to nodes; what is no c in float64 where `double`."""

    def make(m: Make) -> Inputs:
        def numbers(*shape: int) -> torch.Tensor:
            if layout == "sliced":
                return m.logits(*shape[:-1], shape[-1] + 3, 4, scale=0.5)[..., 1:-2, 1:3]
            if layout == "transposed":
                return m.logits(2, shape[-1], *shape[:-1], scale=0.5).movedim((1, 0), (-2, -1))
            return m.logits(*shape, 2, scale=0.5)

        turns = torch.arange(states) * 3.0 * (-1.0) ** torch.arange(states)
        a = torch.stack((-0.5 - m.uniform(features, states).cpu(), turns.expand(features, -1)), -1)
        a = a.to(m.device, torch.float64 if double else m.dtype)
        dt = (0.1 * m.uniform(features) + 0.05).to(torch.float64 if double else m.dtype)
        b, p, c = numbers(features, states), numbers(features, states), numbers(channels, features, states)
        return (a, *(t.double() if double else t for t in (b, p)), c, dt, length), {}

    return make


SAMPLES = [
    Sample("s4_spectrum", "plain", _space(1, 3, 4, 20)),
    Sample("s4_spectrum", "one", _space(1, 1, 1, 2)),
    Sample("s4_spectrum", "odd", _space(1, 2, 3, 17)),
    Sample("s4_spectrum", "channels", _space(3, 2, 5, 64)),
    Sample("s4_spectrum", "tiles", _space(1, 1, 33, 1101, double=True)),
    Sample("s4_spectrum", "sliced", _space(2, 3, 4, 31, "sliced")),
    Sample("s4_spectrum", "transposed", _space(2, 3, 4, 30, "transposed")),
    Sample("s4_spectrum", "no-features", _space(1, 0, 2, 6)),
    Sample("s4_spectrum", "no-channels", _space(0, 2, 2, 6)),
]
