"""Row statistics of the fused distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .fuse import fused


def fused_stats(
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
    targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, max, argmax, entropy H = -sum_v P_v log P_v and target_logp = z[target] - lse, each ``[B]``.

    P = softmax(z), z as in `fuse_logits`; a term with P_v = 0 is 0. Ties of argmax go to the smallest index and a NaN
    counts as the largest value, as in `torch.argmax`. Without targets target_logp is ``[0]``. A row without a
    finite logit has lse = max = -inf, argmax 0 and NaN for the other two.
    """
    z = fused(base, experts, anti, weights, weight_values, base_weight, temperature, temperature_value, plausible,
              plausible_value, vocab_size)
    top, logp = z.amax(-1), z.log_softmax(-1)
    # argmax of a mask is its first True on every device; of floats, PyTorch promises no order among ties
    argmax = ((z == top.unsqueeze(1)) | z.isnan()).to(torch.uint8).argmax(-1)
    entropy = -torch.where(logp == -math.inf, 0.0, logp.exp() * logp).sum(-1)
    target_logp = z.new_empty(0) if targets is None else logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    return log_sum_exp(z), top, argmax, entropy, target_logp
