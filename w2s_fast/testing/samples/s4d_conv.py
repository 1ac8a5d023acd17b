"""Samples of `s4d_conv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _space(
    rows: int, features: int, length: int, states: int, layout: str = "plain", carried: bool = False,
    returned: bool = False, double: bool = False, slow: bool = False,
) -> Callable[[Make], Inputs]:  # fmt: skip
    """Factors of a step from those that fade within a chunk to those that last (`slow`: all of them do)."""

    def make(m: Make) -> Inputs:
        if layout == "sliced":
            u = m.logits(rows + 1, features, length + 3, scale=1.0)[1:, :, 2:-1]
            b, c = (m.logits(features, 2 * states, 4, scale=0.5)[:, ::2, 1:3] for _ in range(2))
        elif layout == "transposed":
            u = m.logits(rows, length, features, scale=1.0).mT
            b, c = (m.logits(2, states, features, scale=0.5).permute(2, 1, 0) for _ in range(2))
        else:
            u = m.logits(rows, features, length, scale=1.0)
            b, c = (m.logits(features, states, 2, scale=0.5) for _ in range(2))
        step = m.uniform(features, 1) * (0.003 if slow else 0.1) + 0.001
        turns = torch.arange(states, device=step.device).expand(features, states) * torch.pi
        z = torch.stack((-0.5 * step.expand(features, states), turns * step), -1)
        z = z.double() if double else z.to(u.dtype)
        state = m.logits(rows, features, states, 2, scale=1.0) if carried else None
        return (u, z, b, c, m.logits(features, scale=1.0), state), {"return_state": returned}

    return make


SAMPLES = [
    Sample("s4d_conv", "plain", _space(2, 3, 70, 4, carried=True, returned=True)),
    Sample("s4d_conv", "one", _space(1, 1, 1, 1, carried=True, returned=True)),
    Sample("s4d_conv", "chunk", _space(2, 2, 32, 16)),
    Sample("s4d_conv", "fresh", _space(2, 2, 33, 3, returned=True)),
    Sample("s4d_conv", "carried", _space(1, 3, 17, 5, carried=True)),
    Sample("s4d_conv", "long", _space(1, 1, 2085, 3, double=True, slow=True, returned=True)),
    Sample("s4d_conv", "states", _space(1, 2, 75, 32, double=True)),
    Sample("s4d_conv", "many-states", _space(1, 2, 75, 33, double=True, carried=True), refused_by=("triton",)),
    Sample("s4d_conv", "double", _space(2, 3, 200, 9, double=True, carried=True, returned=True)),
    Sample("s4d_conv", "sliced", _space(2, 3, 45, 4, "sliced", returned=True)),
    Sample("s4d_conv", "transposed", _space(2, 5, 37, 3, "transposed")),
    Sample("s4d_conv", "empty", _space(0, 3, 5, 2, returned=True)),
    Sample("s4d_conv", "no-positions", _space(2, 3, 0, 2, carried=True, returned=True)),
]
