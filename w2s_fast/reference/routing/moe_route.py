"""Routing: the k experts of a token, their weights, and what losses of balance and size need of all probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype, log_sum_exp

#: Added to a sum of sigmoids before it divides.
TINY = 1e-20


class Routing(NamedTuple):
    """Of T tokens: weights ``[T, k]``, indices int64 ``[T, k]``, lse ``[T]``; over the real ones counts int64 ``[E]``,
    psum ``[E]`` and tokens int64 ``[]``, their number."""

    weights: Tensor
    indices: Tensor
    lse: Tensor
    counts: Tensor
    psum: Tensor
    tokens: Tensor


def moe_route(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, k: int, score: str, renormalize: bool
) -> Routing:
    """The k largest of each row of logits ``[T, E]``, of equal ones the first; a NaN counts as the largest.

    "softmax": p = softmax(z), weights are p of the chosen; "topk": weights are the softmax over the chosen z;
    "sigmoid": s = sigmoid(z), weights are s of the chosen, and p = s / (sum s + 1e-20). With a bias ``[E]`` the choice
    is by p + bias (s + bias). ``renormalize`` divides weights by their sum. lse is of z; psum = sum_t p_t. Rows whose
    mask ``[T]`` is False are in no sum and have lse 0.
    """
    z = logits.to(accumulate_dtype(logits))
    scores = z.sigmoid() if score == "sigmoid" else z.softmax(-1)
    by = z if bias is None else scores + bias.to(z.dtype)
    indices = torch.sort(by, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    if score == "sigmoid":
        weights = scores.gather(1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + TINY) if renormalize else weights
        scores = scores / (scores.sum(-1, keepdim=True) + TINY)
    elif score == "topk" or renormalize:
        weights = z.gather(1, indices).softmax(-1)
    else:
        weights = scores.gather(1, indices)
    lse, rows = log_sum_exp(z), torch.ones_like(indices[:, 0])
    if mask is not None:
        lse, scores, rows = torch.where(mask, lse, 0.0), torch.where(mask[:, None], scores, 0.0), mask.long()
    counts = rows.new_zeros(logits.shape[1]).index_add(0, indices.flatten(), rows[:, None].expand_as(indices).flatten())
    return Routing(weights, indices, lse, counts, scores.sum(0), rows.sum())


def moe_route_backward(
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    grad_psum: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    """dlogits like logits, of weights ``[T, k]``, lse ``[T]`` and psum ``[E]``; a gradient that is None is 0.

    With g_j of the chosen and q_i of psum, p = softmax(z): ``dz_i = p_i (q_i - sum p q + lse's)``, and at the chosen
    ``w_j (g_j - sum w g)``, where w are not divided by their sum ``w_j g_j - p_i sum w g``. Of sigmoids
    ``s_i (1 - s_i) (q_i - sum p q) / sum s``, and at the chosen ``s_j (1 - s_j) g_j``, or with their shares
    ``(g_j - sum w g) / sum s`` over the chosen for g_j.
    """
    z, dz_sums = logits.to(weights.dtype), torch.zeros_like(logits, dtype=weights.dtype)
    g = torch.zeros_like(weights) if grad_weights is None else grad_weights
    inner = (weights * g).sum(-1, keepdim=True)
    if score == "sigmoid":
        s = z.sigmoid()
        slope = s * (1 - s)
        if renormalize:
            g = (g - inner) / (s.gather(1, indices).sum(-1, keepdim=True) + TINY)
        dz = torch.zeros_like(z).scatter(1, indices, g * slope.gather(1, indices))
        if grad_psum is not None:
            total = s.sum(-1, keepdim=True) + TINY
            dz_sums = slope * (grad_psum - (s * grad_psum).sum(-1, keepdim=True) / total) / total
    else:
        p, whole = z.softmax(-1), score == "softmax" and not renormalize
        dz = torch.zeros_like(z).scatter(1, indices, weights * (g if whole else g - inner))
        dz = dz - p * inner if whole else dz
        if grad_psum is not None:
            dz_sums = p * (grad_psum - (p * grad_psum).sum(-1, keepdim=True))
    if grad_lse is not None:
        dz_sums = dz_sums + z.softmax(-1) * grad_lse[:, None]
    return (dz + (dz_sums if mask is None else torch.where(mask[:, None], dz_sums, 0.0))).to(logits.dtype)
