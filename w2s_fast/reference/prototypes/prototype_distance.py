"""The nearest of K prototypes, the log-sum-exp of all and the score of one, of every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype, log_sum_exp


class Scores(NamedTuple):
    """Of z ``[N, K]``: the k largest ``[N, k]`` in falling order, equal ones by index, and their indices int64
    ``[N, k]``; lse ``[N]``, at_label ``[N]`` and the rows' sums of squares ``[N]``, each ``[0]`` where not wanted.

    A score of -inf is never among the largest: -inf and the index -1 stand where there are too few others. A row with a
    NaN has NaN and -1 throughout.
    """

    top: Tensor
    indices: Tensor
    lse: Tensor
    at_label: Tensor
    square: Tensor


def prototype_distance(
    x: Tensor,
    prototypes: Tensor,
    offset: Tensor,
    labels: Tensor | None,
    temperature: float,
    k: int,
    need_lse: bool,
    need_square: bool,
) -> Scores:
    """z = (x p^T + offset) / temperature of x ``[N, D]``, prototypes ``[K, D]``, offset ``[K]``; labels int64 ``[N]``.

    float32, float64 if x or prototypes is.
    """
    acc = accumulate_dtype(x, prototypes)
    rows = x.to(acc)
    z = (rows @ prototypes.to(acc).t() + offset.to(acc)) / temperature
    ordered = z.sort(dim=1, descending=True, stable=True)
    lost = z.isnan().any(1, keepdim=True)
    top = torch.where(lost, torch.nan, ordered.values[:, :k])
    indices = torch.where(lost | (top == -torch.inf), -1, ordered.indices[:, :k])
    none = z.new_empty(0)
    return Scores(
        top,
        indices,
        log_sum_exp(z) if need_lse else none,
        none if labels is None else z.gather(1, labels.unsqueeze(1)).squeeze(1),
        rows.square().sum(1) if need_square else none,
    )
