"""Samples of `topk_mask` and `nm_mask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ROWS, Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _few(m: Make, *shape: int) -> Tensor:
    """Many equal magnitudes of both signs, a minus zero among them."""
    return (m.logits(*shape, scale=1.5).round() / 2).to(m.dtype)


def _bent(m: Make) -> Tensor:
    x = m.logits(3, 64)
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    return x


def _topk(name: str, scores: Callable[[Make], Tensor], k: int | float, **options: Any) -> Sample:
    def make(m: Make) -> Inputs:
        given = {"density": k} if isinstance(k, float) else {"k": k}
        return (scores(m),), {**given, **options}

    return Sample("topk_mask", name, make, grad=False)


def _nm(name: str, weight: Callable[[Make], Tensor], n: int, m: int, scored: bool = False) -> Sample:
    def make(make: Make) -> Inputs:
        given = weight(make)
        return (given, n, m), {"metric": make.logits(*given.shape)} if scored else {}

    return Sample("nm_mask", name, make, grad=False)


LAYOUTS = {name: rows for name, rows in ROWS.items() if name != "special"}  # NaN is refused

SAMPLES = [
    *(_topk(name, rows, 0.3) for name, rows in LAYOUTS.items()),
    *(_topk(f"rows-{name}", rows, 0.5, scope="row") for name, rows in LAYOUTS.items()),
    _topk("ties", lambda m: _few(m, 3, 700), 1000),
    _topk("ties-rows", lambda m: _few(m, 3, 2100), 700, scope="row"),
    _topk("infinite", _bent, 2),
    _topk("none", lambda m: m.logits(2, 9), 0),
    _topk("all", lambda m: m.logits(2, 9), 18),
    _topk("long", lambda m: m.logits(1, 300_001), 0.1),
    _topk("long-ties", lambda m: _few(m, 1, 300_001), 0.25),
    _nm("plain", lambda m: m.logits(5, 8), 2, 4),
    _nm("long", lambda m: m.logits(3, 8232), 2, 4),
    _nm("sliced", lambda m: m.logits(6, 140)[1:, 3:135], 2, 4),
    _nm("transposed", lambda m: m.logits(136, 11).t(), 4, 8),
    _nm("expanded", lambda m: m.logits(1, 128).expand(3, 128), 1, 4),
    _nm("ties", lambda m: _few(m, 7, 192), 2, 4),
    _nm("ties-of-eight", lambda m: _few(m, 7, 192), 3, 8),
    _nm("metric", lambda m: m.logits(3, 2, 96), 1, 2, scored=True),
    _nm("odd", lambda m: _few(m, 4, 105), 2, 3),
    _nm("most", lambda m: _few(m, 3, 128), 20, 32),
    _nm("all", lambda m: m.logits(2, 128), 4, 4),
    _nm("infinite", _bent, 2, 4),
    _nm("empty", lambda m: m.logits(0, 8), 2, 4),
    _nm("no-columns", lambda m: m.logits(5, 0), 2, 4),
]
