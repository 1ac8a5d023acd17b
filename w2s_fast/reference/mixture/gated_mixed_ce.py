"""gated_mixed_ce: the cross-entropy of two experts' logits, mixed by a gate a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


class Mixed(NamedTuple):
    """loss ``[]`` and its gradients: da, db like a and b, ``[0]`` where not wanted, and dgate ``[n]``."""

    loss: Tensor
    da: Tensor
    db: Tensor
    dgate: Tensor


def gated_mixed_ce(
    a: Tensor, b: Tensor, target: Tensor, gate: Tensor, factor: Tensor, ignore_index: int, logits: bool, need_a: bool,
    need_b: bool,
) -> Mixed:  # fmt: skip
    """factor ``[]`` times the sum over rows of ``g CE(a) + (1 - g) CE(b)``, or with ``logits`` ``CE(g a + (1 - g) b)``.

    a, b ``[n, C]``, target int64 ``[n]``, gate g ``[n]``; rows with ``ignore_index`` count nowhere. float32, float64 if
    a, b or the gate are.
    """
    acc = accumulate_dtype(a, b, gate)
    first, second, g = a.to(acc), b.to(acc), gate.to(acc).unsqueeze(1)
    keep = (target != ignore_index).unsqueeze(1)
    own = torch.where(keep, target.unsqueeze(1), 0)
    weight = torch.where(keep, factor.to(acc), 0.0)
    scores = (g * first + (1 - g) * second,) if logits else (first, second)
    losses = [-z.log_softmax(1).gather(1, own) for z in scores]
    if logits:
        p, apart = scores[0].softmax(1), first - second
        loss = losses[0]
        gap = torch.where(p == 0, 0.0, p * apart).sum(1, keepdim=True) - apart.gather(1, own)
    else:
        loss, gap = g * losses[0] + (1 - g) * losses[1], losses[0] - losses[1]

    def gradient(like: Tensor, z: Tensor, share: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return like.new_empty(0)
        off = z.softmax(1).scatter_add(1, own, z.new_full(own.shape, -1))
        return torch.where(keep, weight * share * off, 0.0).to(like.dtype)

    return Mixed(
        torch.where(keep, weight * loss, 0.0).sum(),
        gradient(a, scores[0], g, need_a),
        gradient(b, scores[-1], 1 - g, need_b),
        torch.where(keep, weight * gap, 0.0).squeeze(1),
    )
