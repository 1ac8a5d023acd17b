"""One token a row from the fused, filtered distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .arguments import Draw, Drawn, Fusion
from .filters import filtered
from .fuse import heat, summed


def draw(z: Tensor, keep: Tensor, uniform: Tensor) -> Tensor:
    """Inverse distribution function in index order: the first kept index whose cumulative mass exceeds u total.

    ``uniform`` is ``[B]`` in [0, 1). Never an index without mass; a product u total that rounds up to the total
    gives the last index with mass.
    """
    top = torch.where(keep, z, -math.inf).amax(-1, keepdim=True)
    mass = torch.where(keep, (z.double() - top.double()).exp(), 0.0)
    positive = mass > 0
    cumulative = mass.cumsum(-1)
    hit = positive & (cumulative > uniform.double().unsqueeze(1) * cumulative[:, -1:])
    last = z.shape[1] - 1 - positive.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return hit.scatter(1, last, True).to(torch.uint8).argmax(-1)


def fused_sample(given: Fusion, how: Draw) -> Drawn:
    """token int64, logprob, lse and kept int32, each ``[B]``; z as in `fuse_logits`, filters as in `filtered`.

    logprob = log softmax(z)[token] and lse are those of the unfiltered z. Temperature 0 takes the largest s (the
    smallest index of ties), with logprob and lse at temperature 1 and kept 1. A row whose lse is not finite (no finite
    logit, NaN, +inf) gives token -1, logprob NaN, kept 0.
    """
    s = summed(given)
    tau = heat(given, s)
    greedy = torch.zeros_like(s[:, :1], dtype=torch.bool) | (torch.as_tensor(tau, device=s.device) == 0)
    z = s / torch.where(greedy, 1.0, torch.as_tensor(tau, dtype=s.dtype, device=s.device))
    lse = log_sum_exp(z)
    best = s == s.amax(-1, keepdim=True)
    first = best.to(torch.uint8).argmax(-1)
    if given.temperature is None and given.temperature_value == 0:
        token, kept = first, torch.ones_like(first)
    else:
        keep = filtered(z, how.top_k, how.top_p, how.min_p)
        token = torch.where(greedy[:, 0], first, draw(z, keep, how.uniform))
        kept = torch.where(greedy[:, 0], 1, keep.sum(-1))
    logprob = z.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    fine = torch.isfinite(lse)
    token, kept = torch.where(fine, token, -1), torch.where(fine, kept, 0)
    return Drawn(token, torch.where(fine, logprob, math.nan), lse, kept.to(torch.int32))
