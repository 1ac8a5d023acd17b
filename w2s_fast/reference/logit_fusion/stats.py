"""Row statistics of the fused distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .arguments import Fusion
from .fuse import fused


class Statistics(NamedTuple):
    """Each ``[B]``; target_logp is ``[0]`` without targets."""

    lse: Tensor
    max: Tensor
    argmax: Tensor
    entropy: Tensor
    target_logp: Tensor


def fused_stats(given: Fusion, targets: Tensor | None) -> Statistics:
    """lse, max, argmax, entropy H = -sum_v P_v log P_v and target_logp = z[target] - lse, each ``[B]``.

    P = softmax(z), z as in `fuse_logits`; a term with P_v = 0 is 0. Ties of argmax go to the smallest index and a NaN
    counts as the largest value, as in `torch.argmax`. Without targets target_logp is ``[0]``. A row without a
    finite logit has lse = max = -inf, argmax 0 and NaN for the other two.
    """
    z = fused(given)
    top, logp = z.amax(-1), z.log_softmax(-1)
    # argmax of a mask is its first True on every device; of floats, PyTorch promises no order among ties
    argmax = ((z == top.unsqueeze(1)) | z.isnan()).to(torch.uint8).argmax(-1)
    entropy = -torch.where(logp == -math.inf, 0.0, logp.exp() * logp).sum(-1)
    target_logp = z.new_empty(0) if targets is None else logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    return Statistics(log_sum_exp(z), top, argmax, entropy, target_logp)
