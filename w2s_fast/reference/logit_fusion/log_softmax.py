"""Log softmax of the fused logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .fuse import fused


def fused_log_softmax(
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
) -> tuple[Tensor, Tensor]:
    """logp = z - lse ``[B, vocab_size]`` in ``out_dtype`` and lse ``[B]``; z as in `fuse_logits`.

    logp is taken as (z - max z) - log sum exp(z - max z): a rounded lse would cost digits of every entry. A row
    without a finite logit has no distribution: its lse is -inf and its logp NaN, as in `torch.log_softmax`.
    """
    z = fused(base, experts, anti, weights, weight_values, base_weight, temperature, temperature_value, plausible,
              plausible_value, vocab_size)
    return z.log_softmax(-1).to(out_dtype), log_sum_exp(z)
