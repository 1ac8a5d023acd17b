"""Fused logits: z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype, difference, log_sum_exp
from .arguments import Fusion
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


def summed(given: Fusion) -> Tensor:
    """s = base_weight base + sum_k w_k d_k ``[B, vocab_size]`` in float32 (float64 if any input is).

    -inf outside the plausible set and wherever base is -inf (unless base_weight is 0). A model with weight 0 adds
    exactly 0, whatever its logits.
    """
    dtype = accumulate_dtype(given.base, *given.experts, *given.anti)
    x = given.base[:, : given.vocab_size].to(dtype)
    s = x * given.base_weight if given.base_weight != 0 else torch.zeros_like(x)
    for k, d in enumerate(shifts(given.experts, given.anti, given.vocab_size, dtype)):
        if given.weights is not None:
            w = given.weights[:, k : k + 1].to(dtype)
            s = s + torch.where(w == 0, 0.0, w * d)
        elif given.weight_values[k] != 0:
            s = s + given.weight_values[k] * d
    if given.base_weight != 0:
        s = torch.where(x == -math.inf, -math.inf, s)
    keep = plausible_set(x, given.plausible, given.plausible_value)
    return s if keep is None else torch.where(keep, s, -math.inf)


def heat(given: Fusion, like: Tensor) -> Tensor | float:
    """Temperature that divides ``[B, V]`` logits: a column ``[B, 1]`` in the dtype of ``like``, or the number."""
    return given.temperature_value if given.temperature is None else given.temperature.to(like.dtype).unsqueeze(1)


def fused(given: Fusion) -> Tensor:
    """z = s / temperature ``[B, vocab_size]`` in float32 (float64 if any input is); s is that of `summed`."""
    s = summed(given)
    return s / heat(given, s)


class FusedLogits(NamedTuple):
    """fused ``[B, vocab_size]`` and lse ``[B]``, ``[0]`` unless needed."""

    fused: Tensor
    lse: Tensor


def fuse_logits(given: Fusion, out_dtype: torch.dtype, need_lse: bool) -> FusedLogits:
    """z ``[B, vocab_size]`` in ``out_dtype`` and lse_b = log sum_v exp z_bv ``[B]`` (``[0]`` unless needed)."""
    z = fused(given)
    return FusedLogits(z.to(out_dtype), log_sum_exp(z) if need_lse else z.new_empty(0))
