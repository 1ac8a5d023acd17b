"""Contrastive losses: cross-entropy or a sigmoid over all pairs of rows of x and y."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import accumulate_dtype, log_sum_exp

KINDS = ("clip", "infonce", "siglip", "supcon")


class Contrastive(NamedTuple):
    """loss ``[]`` and its gradients: dx, dy like x and y, dscale and dbias ``[]``, each ``[0]`` where not wanted.

    positives int64 ``[M]``, how many each row has, ``[0]`` but for supcon.
    """

    loss: Tensor
    positives: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dbias: Tensor


class _Pairs(NamedTuple):
    """Losses of the rows ``[M]`` (their mean is the loss) and the loss's gradient in z ``[M, N]``."""

    rows: Tensor
    dz: Tensor


def _softmax(z: Tensor, own: Tensor) -> _Pairs:
    lse = log_sum_exp(z)
    return _Pairs(lse - torch.where(own, z, 0.0).sum(1), (z - lse.unsqueeze(1)).exp() - own.to(z.dtype))


def _both_ways(z: Tensor, own: Tensor) -> _Pairs:
    across, down = _softmax(z, own), _softmax(z.t(), own.t())
    return _Pairs((across.rows + down.rows) / 2, (across.dz + down.dz.t()) / 2)


def _sigmoid(z: Tensor, own: Tensor) -> _Pairs:
    # of the own column softplus(-z) and -sigmoid(-z), which keep their digits where they are small
    signed = torch.where(own, -z, z)
    dz = torch.where(own, -signed.sigmoid(), signed.sigmoid())
    return _Pairs(F.softplus(signed, threshold=1e4).sum(1), dz)


def _supervised(z: Tensor, own: Tensor, same: Tensor) -> _Pairs:
    count = same.sum(1, keepdim=True)
    lse = log_sum_exp(z.masked_fill(own, -torch.inf)).unsqueeze(1)
    share = same.to(z.dtype) / count.clamp_min(1)
    rows = lse - torch.where(same, z, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
    dz = torch.where(own, 0.0, (z - lse).exp()) - share
    return _Pairs(torch.where(count > 0, rows, 0.0).squeeze(1), torch.where(count > 0, dz, 0.0))


def contrastive_loss(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    column_labels: Tensor | None,
    kind: str,
    first: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> Contrastive:
    """The mean over the rows of x ``[M, d]`` of their losses against the rows of y ``[N, d]``, z = scale x y^T + bias.

    Row i's own column is o_i = first + i.
    clip: (lse_i(z) + lse_j(z^T) - 2 z_ii) / 2; infonce: lse_i - z_{i, o_i};
    siglip: sum_{j != o_i} softplus(z_ij) + softplus(-z_{i, o_i});
    supcon: lse without the own column less the mean of z over the other columns of row i's label, 0 where there are
    none; y None is x, and ``column_labels`` None is ``labels``. float32, float64 if x or y is; the mean of none is 0.
    """
    acc = accumulate_dtype(x) if y is None else accumulate_dtype(x, y)
    a = x.to(acc)
    b = a if y is None else y.to(acc)
    s, raw = scale.to(acc), a @ b.t()
    z = raw * s if bias is None else raw * s + bias.to(acc)
    m, n = raw.shape
    own = torch.arange(n, device=x.device) == torch.arange(first, first + m, device=x.device).unsqueeze(1)
    positives = own.new_empty(0, dtype=torch.int64)
    if kind == "supcon":
        assert labels is not None
        same = (labels.unsqueeze(1) == (labels if column_labels is None else column_labels)) & ~own
        positives, found = same.sum(1), _supervised(z, own, same)
    else:
        found = {"clip": _both_ways, "infonce": _softmax, "siglip": _sigmoid}[kind](z, own)
    rows, dz = found.rows.sum() / max(m, 1), found.dz / max(m, 1)
    if y is None:
        dz_x, dz_y = dz + dz.t(), dz
    else:
        dz_x, dz_y = dz, dz
    none = raw.new_empty(0)
    return Contrastive(
        rows,
        positives,
        (s * (dz_x @ b)).to(x.dtype) if need_x else none.to(x.dtype),
        (s * (dz_y.t() @ a)).to(y.dtype) if need_y and y is not None else none.to(x.dtype if y is None else y.dtype),
        (dz * raw).sum() if need_scale else none,
        dz.sum() if need_scale else none,
    )
