"""Decoding batches of a few large models, and what plain PyTorch does with their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..cases._exact import draw, exact_weights, inverse_cdf_token, tilt
from ..cases._logits import grid_vec, inv_cdf, models, shifted
from ..cases.fusing import _ours, _ours_stats, _plain_fuse, _plain_log_softmax, _plain_stats
from ..domain import Domain, Random, Sizes, Way, near

SIZES = {"B": (1, 64), "V": (1000, 160_000)}


def _logits(uniform: bool = False) -> Any:
    def make(random: Random, sizes: Sizes) -> tuple[Any, ...]:
        found = models(sizes["B"], sizes["V"], uniform=uniform)(random.generator, random.device)
        return (*(random.placed(t) for t in found[:3]), *found[3:])

    return make


def _elements(sizes: Sizes) -> float:
    return 3.0 * sizes["B"] * sizes["V"]


def _flops(sizes: Sizes) -> float:
    return 20.0 * sizes["B"] * sizes["V"]


def _domain(op: str, ours: Way, plain: Way, **options: Any) -> Domain:
    uniform = options.pop("uniform", False)
    return Domain(
        op, SIZES, _logits(uniform), lambda sizes: {"ours": ours, "eager": plain}, _flops, _elements, **options
    )


def _ours_sample(base: Tensor, expert: Tensor, anti: Tensor, uniform: Tensor) -> Tensor:
    return w2s_fast.fused_sample(base, [expert], anti, uniform=uniform).token


def _plain_sample(base: Tensor, expert: Tensor, anti: Tensor, uniform: Tensor) -> Any:
    z = shifted(base, expert, anti)
    return draw(z, uniform) if z.dtype == torch.float64 else inv_cdf(z, uniform)


def _ours_weights(base: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    return w2s_fast.dynamic_fusion_weights(base, [expert], anti).alpha[:, 0]


def _plain_weights(base: Tensor, expert: Tensor, anti: Tensor) -> Any:
    return tilt(base, expert, anti) if base.dtype == torch.float64 else grid_vec(base, expert, anti)


def _weights(actual: Any, expected: Any) -> float:
    """The solver's are exact; the grid's lie within a step of them."""
    below, above = (expected.kl(actual.double() + step) <= expected.target for step in (-0.1, 0.1))
    beside = bool(((below | (actual <= 0.11)) & (~above | (actual >= 1.89))).all())
    return 0.0 if beside else exact_weights(2e-4)(actual, expected)


DOMAINS = [
    _domain("fuse_logits", _ours(w2s_fast.fuse_logits), _plain_fuse, trained=(0, 1)),
    _domain("fused_log_softmax", _ours(w2s_fast.fused_log_softmax), _plain_log_softmax, trained=(0, 1)),
    _domain("fused_stats", _ours_stats, _plain_stats, compare=near(1e-2)),
    _domain("fused_sample", _ours_sample, _plain_sample, uniform=True, compare=inverse_cdf_token(2e-3)),
    Domain(
        "dynamic_fusion_weights", {"B": (1, 32), "V": (1000, 160_000)}, _logits(),
        lambda sizes: {"ours": _ours_weights, "eager": _plain_weights}, _flops,
        lambda sizes: 20.0 * sizes["B"] * sizes["V"], compare=_weights,
    ),
]  # fmt: skip
