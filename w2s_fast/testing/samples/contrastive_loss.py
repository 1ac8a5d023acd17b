"""Samples of `contrastive_loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _rows(m: Make, rows: int, width: int, layout: str = "plain") -> Tensor:
    """Rows of about unit norm."""
    scale = width**-0.5
    if layout == "transposed":
        return m.logits(width, rows, scale=scale).t()
    if layout == "sliced":
        return m.logits(rows + 1, width + 3, scale=scale)[1:, 2:-1]
    return m.logits(rows, width, scale=scale)


def _pairs(
    kind: str, rows: int, width: int, scale: float = 10.0, columns: int = 0, bias: float | None = None,
    layout: str = "plain", **options: Any,
) -> Callable[[Make], Inputs]:  # fmt: skip
    def make(m: Make) -> Inputs:
        x, y = _rows(m, rows, width, layout), _rows(m, columns or rows, width, layout)
        number = torch.tensor(scale, device=x.device)  # a parameter stays float32 beside bfloat16 features
        given = {} if bias is None else {"bias": torch.tensor(bias, device=x.device)}
        return (x, y, number), {"kind": kind, **given, **options}

    return make


def _labels(rows: int, width: int, classes: int, columns: int = 0, scale: float = 5.0, **options: Any) -> Any:
    def make(m: Make) -> Inputs:
        x = _rows(m, rows, width)
        labels = m.integers(classes, rows) * 1_000_003 - 5
        number = torch.tensor(scale, device=x.device)
        if not columns:
            return (x, None, number), {"kind": "supcon", "labels": labels, **options}
        other = m.integers(classes, columns) * 1_000_003 - 5
        y = _rows(m, columns, width)
        return (x, y, number), {"kind": "supcon", "labels": labels, "column_labels": other, **options}

    return make


SAMPLES = [
    Sample("contrastive_loss", "clip", _pairs("clip", 7, 24)),
    Sample("contrastive_loss", "clip-tiles", _pairs("clip", 37, 33, 30.0)),
    Sample("contrastive_loss", "clip-sliced", _pairs("clip", 19, 16, 10.0, layout="sliced")),
    Sample("contrastive_loss", "clip-transposed", _pairs("clip", 13, 20, 10.0, layout="transposed")),
    Sample("contrastive_loss", "clip-large", _pairs("clip", 11, 16, 1000.0)),
    Sample("contrastive_loss", "infonce", _pairs("infonce", 7, 24, 10.0, 40, first=9)),
    Sample("contrastive_loss", "siglip", _pairs("siglip", 17, 24, 10.0, bias=-3.0)),
    Sample("contrastive_loss", "siglip-columns", _pairs("siglip", 7, 24, 10.0, 67, bias=-3.0, first=20)),
    Sample("contrastive_loss", "siglip-bare", _pairs("siglip", 5, 8, 40.0)),
    Sample("contrastive_loss", "supcon", _labels(29, 24, 5)),
    Sample("contrastive_loss", "supcon-alone", _labels(17, 8, 1000)),
    Sample("contrastive_loss", "supcon-columns", _labels(9, 24, 4, 70, first=31, reduction="valid_mean")),
    Sample("contrastive_loss", "one", _pairs("clip", 1, 1)),
    Sample("contrastive_loss", "empty", _pairs("clip", 0, 5)),
]
