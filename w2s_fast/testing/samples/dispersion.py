"""Samples of `dispersion`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import ROWS, Make, Sample

_ROWS: dict[str, Callable[[Make], Tensor]] = {
    **{name: rows for name, rows in ROWS.items() if name not in ("one", "no-columns")},
    "one": lambda m: m.logits(1, 2),
    "two-classes": lambda m: m.logits(35, 2),
    "lanes": lambda m: m.logits(16, 16),
    "blocks": lambda m: m.logits(9, 131),
    "uniform": lambda m: m.logits(19, 47, scale=0.0),
    "sure": lambda m: m.logits(18, 40, scale=60.0),
}


def _sample(name: str, rows: Callable[[Make], Tensor]) -> Sample:
    return Sample("dispersion", name, lambda m: ((rows(m),), {"detach": False}))


SAMPLES = [
    *(_sample(name, rows) for name, rows in _ROWS.items()),
    Sample("dispersion", "detached", lambda m: ((m.logits(5, 7),), {}), grad=False),
]
