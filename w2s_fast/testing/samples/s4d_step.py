"""Samples of `s4d_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _step(
    rows: int, features: int, states: int, layout: str = "plain", double: bool = False
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        if layout == "sliced":
            u = m.logits(rows + 1, features + 2, scale=1.0)[1:, 1:-1]
            pairs = [m.logits(features, 2 * states, 4, scale=0.5)[:, ::2, 1:3] for _ in range(3)]
            state = m.logits(rows, features, states + 1, 2, scale=1.0)[:, :, 1:]
        elif layout == "transposed":
            u = m.logits(features, rows, scale=1.0).t()
            pairs = [m.logits(2, states, features, scale=0.5).permute(2, 1, 0) for _ in range(3)]
            state = m.logits(features, rows, 2, states, scale=1.0).permute(1, 0, 3, 2)
        else:
            u = m.logits(rows, features, scale=1.0)
            pairs = [m.logits(features, states, 2, scale=0.5) for _ in range(3)]
            state = m.logits(rows, features, states, 2, scale=1.0)
        return (u, *(p.double() if double else p for p in pairs), m.logits(features, scale=1.0), state), {}

    return make


def _special(m: Make) -> Inputs:
    args, options = _step(5, 3, 4)(m)
    args[0][:, 1] = m.special(5)
    return args, options


SAMPLES = [
    Sample("s4d_step", "plain", _step(3, 5, 4)),
    Sample("s4d_step", "one", _step(1, 1, 1)),
    Sample("s4d_step", "layer", _step(2, 16, 32)),
    Sample("s4d_step", "many-states", _step(2, 3, 101)),
    Sample("s4d_step", "double", _step(2, 3, 17, double=True)),
    Sample("s4d_step", "sliced", _step(3, 4, 5, "sliced")),
    Sample("s4d_step", "transposed", _step(3, 4, 5, "transposed")),
    Sample("s4d_step", "special", _special, grad=False),
    Sample("s4d_step", "empty", _step(0, 3, 2)),
    Sample("s4d_step", "no-features", _step(2, 0, 2)),
]
