"""Samples of `moe_route`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ROWS, Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _routed(
    rows: Callable[[Make], Tensor], k: int, *, biased: bool = False, masked: bool = False, **options: Any
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        logits = rows(m)
        given = dict(options)
        if biased:  # no two scores so near to each other that rounding decides
            given["bias"] = 0.5 * torch.randn(logits.shape[1], generator=m.generator).to(logits)
        if masked:
            given["mask"] = (torch.arange(len(logits), device=logits.device) % 3 != 1) & (m.uniform(len(logits)) < 0.9)
        return (logits, k), given

    return make


def _size(*shape: int, **how: float) -> Callable[[Make], Tensor]:
    return lambda m: m.logits(*shape, **how)


def _ties(m: Make) -> Tensor:
    """Few numbers many times, and a row of one number."""
    x = m.integers(3, 9, 40).to(m.dtype)
    x[4] = 1.5
    return x


def _sample(name: str, make: Callable[[Make], Inputs], **more: Any) -> Sample:
    return Sample("moe_route", name, make, **more)


SAMPLES = [
    *(_sample(name, _routed(ROWS[name], 3)) for name in ("plain", "sliced", "transposed", "expanded", "empty")),
    _sample("one", _routed(ROWS["one"], 1)),
    _sample("offset", _routed(_size(3, 101, offset=1000.0), 5, renormalize=True)),
    _sample("special", _routed(ROWS["special"], 3), grad=False),
    _sample("special-topk", _routed(ROWS["special"], 3, score="topk"), grad=False),
    _sample("special-sigmoid", _routed(ROWS["special"], 3, score="sigmoid", renormalize=True), grad=False),
    _sample("mixtral", _routed(_size(67, 8), 2, renormalize=True)),
    _sample("qwen3", _routed(_size(33, 128), 8, renormalize=True, masked=True)),
    _sample("paper", _routed(_size(130, 160, scale=1.0), 4)),
    _sample("topk", _routed(_size(21, 64), 4, score="topk", masked=True)),
    _sample("every", _routed(_size(5, 19), 19, score="topk")),
    _sample("many", _routed(_size(3, 130), 20)),
    _sample("many-few", _routed(_size(3, 61), 60, renormalize=True), refused_by=("triton",)),
    _sample("deepseek", _routed(_size(9, 64), 6, score="sigmoid", renormalize=True, biased=True)),
    _sample("sigmoid", _routed(_size(9, 37), 3, score="sigmoid", masked=True)),
    _sample("biased", _routed(_size(9, 50, scale=1.0), 4, biased=True)),
    _sample("biased-share", _routed(_size(9, 50), 4, biased=True, renormalize=True)),
    _sample("ties", _routed(_ties, 5)),
    _sample("large", _routed(_size(7, 48, scale=60.0), 3)),
]
