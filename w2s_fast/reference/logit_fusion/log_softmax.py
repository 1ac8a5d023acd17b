"""Log softmax of the fused logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .arguments import Fusion
from .fuse import fused


class LogSoftmax(NamedTuple):
    """logp ``[B, vocab_size]`` and lse ``[B]``."""

    logp: Tensor
    lse: Tensor


def fused_log_softmax(given: Fusion, out_dtype: torch.dtype) -> LogSoftmax:
    """logp = z - lse ``[B, vocab_size]`` in ``out_dtype`` and lse ``[B]``; z as in `fuse_logits`.

    logp is taken as (z - max z) - log sum exp(z - max z): a rounded lse would cost digits of every entry. A row
    without a finite logit has no distribution: its lse is -inf and its logp NaN, as in `torch.log_softmax`.
    """
    z = fused(given)
    return LogSoftmax(z.log_softmax(-1).to(out_dtype), log_sum_exp(z))
