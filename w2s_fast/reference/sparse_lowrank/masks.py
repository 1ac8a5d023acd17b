"""Masks of the largest magnitudes: of a row, or of every m consecutive entries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """mask: bool, of the shape of the scores; nans: int64 ``[]``, how many scores are NaN."""

    mask: Tensor
    nans: Tensor


def _sizes(scores: Tensor) -> tuple[Tensor, Tensor]:
    """|scores|, infinite for a NaN, and how many NaN there are."""
    lost = scores.isnan()
    return torch.where(lost, torch.inf, scores.abs()), lost.sum()


def topk_mask(scores: Tensor, k: int) -> Mask:
    """True at exactly k of every row of scores ``[R, D]``: the largest |scores|, equal ones by index. 0 <= k <= D.

    A NaN is as large as infinity.
    """
    size, nans = _sizes(scores)
    if k == 0 or k == size.shape[1]:
        return Mask(torch.full_like(size, k > 0, dtype=torch.bool), nans)
    threshold = size.kthvalue(size.shape[1] - k + 1, 1, keepdim=True).values if size.shape[0] else size[:, :1]
    above, equal = size > threshold, size == threshold
    missing = k - above.sum(1, keepdim=True)
    return Mask(above | (equal & (equal.cumsum(1) <= missing)), nans)


def nm_mask(scores: Tensor, n: int, m: int) -> Mask:
    """True at n of every m consecutive columns of scores ``[R, C m]``: the largest |scores|, equal ones by index.

    A NaN is as large as infinity.
    """
    size, nans = _sizes(scores)
    columns = size.reshape(-1, m).unbind(1)
    # an entry's rank: how many before it are as large, and how many behind it are larger
    ranks = [torch.full_like(columns[0], m - 1 - i, dtype=torch.int8) for i in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = (columns[i] >= columns[j]).to(torch.int8)
            ranks[i] = ranks[i] - first_wins
            ranks[j] = ranks[j] + first_wins
    return Mask(torch.stack([rank < n for rank in ranks], 1).reshape(scores.shape), nans)
