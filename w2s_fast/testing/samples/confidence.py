"""Samples of weak-to-strong generalization's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _soft(m: Make, batch: int, classes: int, zeros: bool = False) -> Tensor:
    """Soft labels, every third of them exactly 0 if asked."""
    z = m.logits(batch, classes).double()
    if zeros:
        z[:, ::3] = -torch.inf
    return z.softmax(-1).to(m.dtype)


def _weak(batch: int, classes: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    return lambda m: ((m.logits(batch, classes), _soft(m, batch, classes)), dict(kwargs))


def _single(batch: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    return lambda m: ((m.logits(batch), m.uniform(batch)), dict(kwargs))


def _extreme(classes: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    """Logits of scale 50 around -1e4."""
    return lambda m: ((m.logits(6, classes, scale=50.0, offset=-1e4), _soft(m, 6, classes)), dict(kwargs))


def _impossible(classes: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    """Logits of -inf where the labels are 0."""

    def make(m: Make) -> Inputs:
        z, w = m.logits(8, classes), _soft(m, 8, classes, zeros=True)
        if classes == 2:
            z[:, 0] = -torch.inf
        else:
            z[:, ::6] = -torch.inf
        return (z, w), dict(kwargs)

    return make


def _layouts(m: Make) -> Inputs:
    """Permuted logits, sliced labels of another dtype."""
    return (m.logits(37, 9).t(), m.uniform(18, 50).double()[::2, 4:41] / 20), {"coef": 0.25}


def _layouts_two(m: Make) -> Inputs:
    """A column apart, labels expanded."""
    return (m.logits(9, 7)[:, 3:5], _soft(m, 1, 2).expand(9, 2)), {"balance": "median"}


def _parts(m: Make) -> Inputs:
    return (m.logits(5, 13), _soft(m, 5, 13)), {"threshold": m.logits(13, scale=1.0)}


def _part_of_two(m: Make) -> Inputs:
    return (m.logits(5, 2), _soft(m, 5, 2)), {"threshold": torch.tensor(0.37, device=m.device)}


LOSS: dict[str, Callable[[Make], Inputs]] = {
    "binary": _weak(17, 2),
    "paper": _weak(32, 2, balance="median", coef=0.75),
    "blocks": _weak(700, 2),
    "none-two": _weak(40, 2, balance="none", coef=1.0),
    "logit": _single(9, balance="median"),
    "logit-product": _single(35, kind="product", alpha=0.5, beta=2.0),
    "classes": _weak(33, 11, coef=0.75),
    "vision": _weak(19, 1000),
    "two-tiles": _weak(3, 2500, balance="none"),
    "product": _weak(5, 7, kind="product", alpha=0.5, beta=2.0),
    "product-two": _weak(21, 2, kind="product"),
    "product-alpha": _weak(5, 67, kind="product", alpha=0.5, beta=0.0),
    "product-beta": _weak(5, 67, kind="product", alpha=0.0, beta=1.5),
    "product-zeros": _impossible(67, kind="product"),
    "xent": _weak(5, 7, kind="xent"),
    "xent-two": _weak(37, 2, kind="xent"),
    "layouts": _layouts,
    "layouts-two": _layouts_two,
    "extreme": _extreme(301),
    "extreme-two": _extreme(2),
    "impossible": _impossible(41),
    "impossible-two": _impossible(2),
    "parts": _parts,
    "parts-two": _part_of_two,
    "one-row": _weak(1, 1000),
    "one-pair": _weak(1, 2),
    "empty": _weak(0, 3),
    "empty-two": _single(0),
}
THRESHOLD: dict[str, Callable[[Make], Inputs]] = {
    "two": _weak(17, 2),
    "median": _weak(300, 2, balance="median"),
    "logit": _single(12),
    "classes": _weak(70, 33),
    "none": _weak(4, 5, balance="none"),
}

SAMPLES: list[Sample] = [
    *(Sample("w2s_confidence_loss", name, make) for name, make in LOSS.items()),
    *(Sample("confidence_threshold", name, make, grad=False) for name, make in THRESHOLD.items()),
]
