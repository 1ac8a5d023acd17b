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
    NaN has NaN and -1 throughout. kept, if needed: x p^T ``[N, K]``, K padded with zeros to a multiple of 16, for
    `prototype_distance_backward`.
    """

    top: Tensor
    indices: Tensor
    lse: Tensor
    at_label: Tensor
    square: Tensor
    kept: Tensor


def prototype_distance(
    x: Tensor,
    prototypes: Tensor,
    offset: Tensor,
    labels: Tensor | None,
    temperature: float,
    k: int,
    need_lse: bool,
    need_square: bool,
    need_kept: bool,
) -> Scores:
    """z = (x p^T + offset) / temperature of x ``[N, D]``, prototypes ``[K, D]``, offset ``[K]``; labels int64 ``[N]``.

    float32, float64 if x or prototypes is.
    """
    acc = accumulate_dtype(x, prototypes)
    rows = x.to(acc)
    products = rows @ prototypes.to(acc).t()
    z = (products + offset.to(acc)) / temperature
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
        torch.nn.functional.pad(products, (0, -len(prototypes) % 16)) if need_kept else none,
    )


class ScoreGradients(NamedTuple):
    """Like x, prototypes and offset; ``[0]`` where not wanted."""

    dx: Tensor
    dprototypes: Tensor
    doffset: Tensor


def prototype_distance_backward(
    x: Tensor,
    prototypes: Tensor,
    offset: Tensor,
    lse: Tensor,
    ids: Tensor,
    coef_ids: Tensor,
    coef_lse: Tensor,
    kept: Tensor,
    temperature: float,
    need_x: bool,
    need_prototypes: bool,
    need_offset: bool,
) -> ScoreGradients:
    """Of ``sum_n coef_lse_n lse_n + sum_c coef_ids_nc z_{n, ids_nc}``, from what `prototype_distance` kept.

    lse, coef_lse ``[N]``; ids int64, coef_ids ``[N, C]``; a negative id is none, a row without a coefficient adds
    nothing, whatever it holds.
    """
    acc = accumulate_dtype(x, prototypes)
    z = (kept[:, : len(prototypes)] + offset.to(acc)) / temperature
    line = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(1)
    dz = (z - line).exp() * coef_lse.unsqueeze(1)
    dz = dz.scatter_add(1, ids.clamp_min(0), torch.where(ids < 0, 0.0, coef_ids))
    counts = (coef_lse != 0) | coef_ids.any(1)
    dz = torch.where(counts.unsqueeze(1), dz, 0.0) / temperature
    return ScoreGradients(
        (dz @ prototypes.to(acc)).to(x.dtype) if need_x else x.new_empty(0),
        (dz.t() @ x.to(acc)).to(prototypes.dtype) if need_prototypes else prototypes.new_empty(0),
        dz.sum(0).to(offset.dtype) if need_offset else offset.new_empty(0),
    )
