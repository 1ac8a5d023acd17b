"""Samples of `gated_mixed_ce`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import ROWS, Make, Sample

OP = "gated_mixed_ce"
_ROWS: dict[str, Callable[[Make], Tensor]] = {
    **{name: rows for name, rows in ROWS.items() if name not in ("special", "no-columns")},
    "two-classes": lambda m: m.logits(35, 2),
    "lanes": lambda m: m.logits(16, 16),
    "blocks": lambda m: m.logits(9, 131),
}


def _sample(name: str, rows: Callable[[Make], Tensor], **options: Any) -> Sample:
    def make(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a = rows(m)
        b = rows(m)
        target = m.integers(max(a.shape[1], 1), len(a))
        if options.get("reduction") != "sum":
            target[1::3] = options.get("ignore_index", -100)
        return (a, b, target, m.uniform(len(a)).to(m.dtype)), options

    return Sample(OP, name, make)


def _unlike(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An expert in float32 beside one of the sample's dtype, and a gate of every other number of a longer one."""
    return (m.logits(21, 10), m.logits(21, 10).float(), m.integers(10, 21), m.uniform(42)[::2]), {}


def _left_out(m: Make, mix: str = "losses") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NaN and infinities in a row that does not count; classes that both experts leave out."""
    a, b, target = m.logits(9, 19), m.logits(9, 19), m.integers(17, 9)
    a[:, 17:] = b[:, 17:] = -math.inf
    a[3, 0], b[3, 2] = math.nan, math.inf
    target[3] = -100
    return (a, b, target, 0.1 + 0.8 * m.uniform(9)), {"mix": mix}


def _nan(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (m.special(4).expand(3, 4), m.logits(3, 4), m.integers(4, 3), m.uniform(3)), {}


_MIXED = ("plain", "long", "sliced", "two-classes", "empty")
SAMPLES = [
    *(_sample(name, rows) for name, rows in _ROWS.items()),
    *(_sample(f"{name}-logits", _ROWS[name], mix="logits") for name in _MIXED),
    _sample("sum", _ROWS["blocks"], reduction="sum"),
    _sample("ignored", _ROWS["lanes"], ignore_index=3),
    Sample(OP, "unlike", _unlike),
    Sample(OP, "left-out", _left_out),
    Sample(OP, "left-out-logits", lambda m: _left_out(m, "logits")),
    Sample(OP, "nan", _nan, grad=False),
]
