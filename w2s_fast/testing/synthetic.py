"""Synthetic logits with the peaks and shifts of language models, and what they are fused to, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension

#: Backends that this machine can run on CPU tensors without the interpreter.
CPU_BACKENDS = ("reference", "cpp") if extension.ERROR is None else ("reference",)


class Models(NamedTuple):
    """Logits of one decoding step: base ``[B, V]``, K experts ``[B, V]``, anti ``[B, V]``."""

    base: Tensor
    experts: list[Tensor]
    anti: Tensor


def language_models(
    rows: int, width: int, count: int = 1, *, peak: float = 9.0, shift: float = 1.0, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Models:
    """A large and an untuned small model that agree on the likely tokens, and ``count`` tuned small models.

    ``peak`` is how far the likeliest tokens stand out (0 flat, 9 as usual, 14 almost certain), ``shift`` how much
    tuning moves the logits. KL(tuned || untuned) is then of the order of 0.01 to 4 nats.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale

    def bumps(number: int, height: float) -> Tensor:
        where = torch.randint(width, (rows, number), generator=generator)
        heights = torch.rand(rows, number, generator=generator, dtype=torch.float64) * height
        return torch.zeros(rows, width, dtype=torch.float64).scatter(1, where, heights)

    common = noise(1.5) + bumps(20, peak)
    common = common.scatter(1, torch.randint(width, (rows, 3), generator=generator), peak)
    anti = common + noise(0.7)
    base = 1.1 * common + noise(0.5) + 2.0
    experts = [anti + shift * (noise(0.4) + bumps(8, 5.0) + 0.3 * (common > 0.8 * peak)) for _ in range(count)]
    return Models(base.to(dtype), [e.to(dtype) for e in experts], anti.to(dtype))


def plain_fusion(
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | Sequence[float] | float = 1.0,
    base_weight: float = 1.0,
    temperature: Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What one writes without this package: (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature."""
    total = base.to(dtype) * base_weight
    for k, expert in enumerate(experts):
        d = expert.to(dtype)
        if anti is not None:
            d = d - (anti if isinstance(anti, Tensor) else anti[k if len(anti) > 1 else 0]).to(dtype)
        if isinstance(weights, Tensor):
            total = total + weights[..., k, None].to(dtype) * d
        else:
            total = total + (weights if isinstance(weights, (int, float)) else weights[k]) * d
    return total / (temperature.to(dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def tilted_kl(base: Tensor, shift: Tensor) -> Tensor:
    """KL(softmax(base + shift) || softmax(base)) ``[B]`` in float64 as its defining sum; finite logits."""
    p, q = base.double().log_softmax(-1), (base.double() + shift.double()).log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def targets_of(m: Models) -> Tensor:
    """KL(softmax(expert_k) || softmax(anti)) ``[B, K]`` in float64."""
    return torch.stack([tilted_kl(m.anti, e.double() - m.anti.double()) for e in m.experts], -1)


def kl_at(m: Models, alpha: Tensor) -> Tensor:
    """KL of the distribution fused with weights ``alpha [B, K]`` to that of base, ``[B]`` in float64."""
    shifts = torch.stack([e.double() - m.anti.double() for e in m.experts], 1)
    return tilted_kl(m.base, (alpha.double().unsqueeze(-1) * shifts).sum(1))
