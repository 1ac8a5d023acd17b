"""Samples of `lora_linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _layer(n: int, rows: int, columns: int, rank: int, more: str = "", scale: float = 0.5) -> Callable[[Make], Inputs]:
    """``more``: which of bias, gain and dropped there are."""

    def make(m: Make) -> Inputs:
        args = (
            m.logits(n, columns, scale=1.0),
            m.logits(rows, columns, scale=max(columns, 1) ** -0.5),
            m.logits(rank, columns, scale=max(columns, 1) ** -0.5),
            m.logits(rows, rank, scale=1.0),
        )
        given = {
            "bias": m.logits(rows, scale=1.0),
            "gain": m.logits(rows, scale=0.2, offset=1.0),
            "dropped": m.logits(n, columns, scale=1.0) * (m.uniform(n, columns) < 0.7).to(m.dtype),
        }
        return args, {"scale": scale, **{name: given[name] for name in more.split()}}

    return make


def _layouts(m: Make) -> Inputs:
    """Permuted and sliced operands, leading dimensions."""
    x = m.logits(2, 140, 9, scale=1.0).transpose(1, 2)[..., 3:136]
    dropped = m.logits(9, 2, 140, scale=1.0).transpose(0, 1)[..., 5:138]
    weight, A = m.logits(80, 150, scale=0.1)[2:77, 4:137], m.logits(133, 11, scale=0.1).t()
    B, vectors = m.logits(75, 20, scale=0.3)[:, 4:15], m.logits(75, 2, scale=1.0)
    return (x, weight, A, B), {"bias": vectors[:, 0], "gain": vectors[:, 1], "dropped": dropped}


def _mixed(weight_too: bool) -> Callable[[Make], Inputs]:
    """Adapters (and vectors) in float32 over a layer of the sample's dtype, as PEFT keeps them."""

    def make(m: Make) -> Inputs:
        (x, weight, A, B), kwargs = _layer(70, 67, 129, 8, "bias gain dropped")(m)
        return (x, weight.float() if weight_too else weight, A.float(), B.float()), {
            **kwargs, "gain": kwargs["gain"].float(), "dropped": kwargs["dropped"].float(),
        }  # fmt: skip

    return make


def _expanded(m: Make) -> Inputs:
    (x, weight, A, B), kwargs = _layer(1, 67, 129, 8, "bias")(m)
    return (x.expand(40, 129), weight, A, B), {**kwargs, "gain": m.logits(1, scale=1.0).expand(67)}


def _extreme(m: Make) -> Inputs:
    """Large numbers that cancel."""
    (x, weight, A, B), kwargs = _layer(17, 64, 256, 16, "gain bias")(m)
    return (x * 50 + 100, weight * 3, A, B), kwargs


def _special(m: Make) -> Inputs:
    """NaN and infinities in some rows of x, in the gain and the bias."""
    (x, weight, A, B), kwargs = _layer(70, 96, 160, 8, "gain bias")(m)
    x[3, 5], x[64, 7] = float("nan"), float("inf")
    kwargs["gain"][:5], kwargs["bias"][40:45] = m.special(5), m.special(5)
    return (x, weight, A, B), kwargs


MADE: dict[str, Callable[[Make], Inputs]] = {
    "plain": _layer(17, 131, 259, 16),
    "bias": _layer(65, 200, 133, 8, "bias", scale=2.0),
    "gain": _layer(65, 131, 259, 16, "gain"),
    "all": _layer(33, 75, 140, 5, "bias gain dropped"),
    "dropped": _layer(40, 70, 64, 12, "dropped bias"),
    "one-row": _layer(1, 517, 300, 24, "bias gain"),
    "seven-rows": _layer(7, 131, 259, 16, "gain"),
    "chunks": _layer(531, 70, 33, 4, "gain bias"),
    "long": _layer(2, 8209, 40, 3, "gain bias"),
    "high-rank": _layer(40, 90, 70, 48, "bias"),
    "no-adapter": _layer(18, 70, 140, 0, "bias gain"),
    "no-scale": _layer(18, 70, 140, 4, "gain", scale=0.0),
    "empty": _layer(0, 70, 140, 12, "bias gain"),
    "no-columns": _layer(5, 7, 0, 3, "bias gain"),
    "no-outputs": _layer(5, 0, 7, 3, "bias gain"),
    "layouts": _layouts,
    "mixed": _mixed(False),
    "mixed-weight": _mixed(True),
    "expanded": _expanded,
    "extreme": _extreme,
}

SAMPLES: list[Sample] = [
    *(Sample("lora_linear", name, make) for name, make in MADE.items()),
    Sample("lora_linear", "special", _special, grad=False),
]
