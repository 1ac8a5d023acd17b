"""Fused logits: z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import accumulate_dtype, difference, log_sum_exp
from .filters import plausible_set


def shifts(experts: Sequence[Tensor], anti: Sequence[Tensor], vocab_size: int, dtype: torch.dtype) -> list[Tensor]:
    """d_k = experts_k - anti_k ``[B, vocab_size]``; anti has 0, 1 (shared) or K tensors.

    Equal entries give exactly 0, so a token that both mask with -inf is not shifted.
    """
    found = []
    for k, expert in enumerate(experts):
        d = expert[:, :vocab_size].to(dtype)
        if anti:
            d = difference(d, anti[k if len(anti) > 1 else 0][:, :vocab_size].to(dtype))
        found.append(d)
    return found


def summed(
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    base_weight: float,
    plausible: int,
    plausible_value: float,
    vocab_size: int,
) -> Tensor:
    """s = base_weight base + sum_k w_k d_k ``[B, vocab_size]`` in float32 (float64 if any input is).

    -inf outside the plausible set and wherever base is -inf (unless base_weight is 0). A model with weight 0 adds
    exactly 0, whatever its logits.
    """
    dtype = accumulate_dtype(base, *experts, *anti)
    x = base[:, :vocab_size].to(dtype)
    s = x * base_weight if base_weight != 0 else torch.zeros_like(x)
    for k, d in enumerate(shifts(experts, anti, vocab_size, dtype)):
        if weights is not None:
            w = weights[:, k : k + 1].to(dtype)
            s = s + torch.where(w == 0, 0.0, w * d)
        elif weight_values[k] != 0:
            s = s + weight_values[k] * d
    if base_weight != 0:
        s = torch.where(x == -math.inf, -math.inf, s)
    keep = plausible_set(x, plausible, plausible_value)
    return s if keep is None else torch.where(keep, s, -math.inf)


def heat(temperature: Tensor | None, temperature_value: float, like: Tensor) -> Tensor | float:
    """Temperature that divides ``[B, V]`` logits: a column ``[B, 1]`` in the dtype of ``like``, or the number."""
    return temperature_value if temperature is None else temperature.to(like.dtype).unsqueeze(1)


def fused(
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    base_weight: float,
    temperature: Tensor | None,
    temperature_value: float,
    plausible: int,
    plausible_value: float,
    vocab_size: int,
) -> Tensor:
    """z = s / temperature ``[B, vocab_size]`` in float32 (float64 if any input is); s is that of `summed`."""
    s = summed(base, experts, anti, weights, weight_values, base_weight, plausible, plausible_value, vocab_size)
    return s / heat(temperature, temperature_value, s)


def fuse_logits(
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    base_weight: float,
    temperature: Tensor | None,
    temperature_value: float,
    plausible: int,
    plausible_value: float,
    vocab_size: int,
    out_dtype: torch.dtype,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """z ``[B, vocab_size]`` in ``out_dtype`` and lse_b = log sum_v exp z_bv ``[B]`` (``[0]`` unless needed)."""
    z = fused(base, experts, anti, weights, weight_values, base_weight, temperature, temperature_value, plausible,
              plausible_value, vocab_size)
    return z.to(out_dtype), log_sum_exp(z) if need_lse else z.new_empty(0)
