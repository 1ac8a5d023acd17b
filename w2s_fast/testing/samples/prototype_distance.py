"""Samples of `prototype_distance`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _prototypes(m: Make, count: int, width: int) -> Tensor:
    """Class means so far apart that no rounding changes their order seen from a row near one of them."""
    return m.logits(count, width, scale=2.0)


def _rows(
    rows: int, classes: int, width: int, layout: str = "plain", labelled: bool = False, masked: bool = False,
    **options: Any,
) -> Callable[[Make], Inputs]:  # fmt: skip
    def make(m: Make) -> Inputs:
        if layout == "transposed":
            x, p = m.logits(width, rows).t(), m.logits(width, classes, scale=2.0).t()
        elif layout == "sliced":
            x, p = m.logits(rows + 1, width + 3)[1:, 2:-1], m.logits(classes, 2 * width)[:, ::2]
        else:
            x, p = m.logits(rows, width), _prototypes(m, classes, width)
        labels = m.integers(classes, rows) if labelled else None
        given: dict[str, Any] = dict(options)
        if masked:
            given["valid"] = torch.arange(classes, device=x.device) % 3 != 1
            p = torch.where(given["valid"].unsqueeze(1), p, torch.nan)
            labels = None if labels is None else labels // 3 * 3
        return (x, p, labels), given

    return make


def _nan(m: Make) -> Inputs:
    x = m.logits(5, 8)
    x[2, 3] = torch.nan
    return (x, _prototypes(m, 7, 8)), {"k": 2, "return_lse": True}


SAMPLES = [
    Sample("prototype_distance", "plain", _rows(7, 5, 24)),
    Sample("prototype_distance", "loss", _rows(19, 33, 24, labelled=True, temperature=20.0)),
    Sample("prototype_distance", "all", _rows(11, 131, 16, labelled=True, k=5, return_lse=True, temperature=30.0)),
    Sample("prototype_distance", "masked", _rows(9, 20, 16, labelled=True, masked=True, k=3, temperature=30.0)),
    Sample("prototype_distance", "few-valid", _rows(4, 2, 16, masked=True, k=2, return_lse=True, temperature=9.0)),
    Sample("prototype_distance", "cosine", _rows(13, 40, 24, labelled=True, k=2, metric="cosine", temperature=0.1)),
    Sample("prototype_distance", "sliced", _rows(9, 37, 16, "sliced", labelled=True, temperature=30.0)),
    Sample("prototype_distance", "transposed", _rows(9, 12, 16, "transposed", return_lse=True, temperature=30.0)),
    Sample("prototype_distance", "indices", _rows(6, 35, 12, labelled=True, temperature=9.0, return_distance=False)),
    Sample("prototype_distance", "one", _rows(1, 1, 1)),
    Sample("prototype_distance", "empty", _rows(0, 3, 4, labelled=True)),
    Sample("prototype_distance", "nan", _nan, grad=False),
]
