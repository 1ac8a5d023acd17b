"""Fused linear heads: z_t = (1/temperature) sum_i w_ti cap(W_i h_ti + b_i), cap(x) = softcap tanh(x / softcap).

These are definitions: they hold the whole [T, V] matrix that the kernels never form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_fusion.sample import draw
from ..numerics import accumulate_dtype, log_sum_exp


class Fused(NamedTuple):
    """The fused logits and their parts.

    Fields: z ``[T, V]``; parts, n of ``[T, V]``: cap(W_i h_i + b_i); slopes, their derivatives cap'(.) (None without a
    softcap); scale ``[T, n]`` or ``[1, n]``: w / temperature.
    """

    z: Tensor
    parts: list[Tensor]
    slopes: list[Tensor] | None
    scale: Tensor


def fused(
    hiddens: Sequence[Tensor],
    heads: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    temperature: float,
    softcap: float,
    vocab_size: int,
) -> Fused:
    """z in float32 (float64 if any hidden or head is), for the first ``vocab_size`` rows of every head.

    ``biases`` is empty or n tensors; ``weights`` is ``[T, n]`` or None (then ``weight_values``); softcap 0 is none.
    """
    dtype = accumulate_dtype(*hiddens, *heads)
    parts = []
    for i, (h, head) in enumerate(zip(hiddens, heads, strict=True)):
        x = h.to(dtype) @ head[:vocab_size].to(dtype).t()
        parts.append(x + biases[i][:vocab_size].to(dtype) if biases else x)
    slopes = None
    if softcap:
        unit = [torch.tanh(x / softcap) for x in parts]
        parts, slopes = [softcap * u for u in unit], [1 - u.square() for u in unit]
    if weights is None:
        scale = torch.tensor([list(weight_values)], dtype=dtype, device=hiddens[0].device)
    else:
        scale = weights.to(dtype)
    scale = scale / temperature
    z = scale[:, :1] * parts[0]
    for i in range(1, len(parts)):
        z = z + scale[:, i : i + 1] * parts[i]
    return Fused(z, parts, slopes, scale)


def linear_fusion_logprobs(
    hiddens: Sequence[Tensor],
    heads: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    temperature: float,
    softcap: float,
    vocab_size: int,
    target: Tensor,
    ignore_index: int,
    need_rows: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp_t = z_t,y - lse_t and lse_t ``[T]``, and, if needed, expectations under p = softmax(z).

    mean_rows ``[T, sum D_i]`` = sum_v p_tv cap'_i,tv W_i,v (the models side by side), mean_logits ``[T, n]`` =
    sum_v p_tv cap(.)_i,tv; each ``[0]`` unless needed. Rows with target = ignore_index are 0 everywhere.
    """
    found = fused(hiddens, heads, biases, weights, weight_values, temperature, softcap, vocab_size)
    keep = target != ignore_index
    lse = log_sum_exp(found.z)
    logp = found.z.gather(1, torch.where(keep, target, 0).unsqueeze(1)).squeeze(1) - lse
    rows, logits = found.z.new_empty(0), found.z.new_empty(0)
    if need_rows or need_logits:
        p = torch.where(keep.unsqueeze(1), probabilities(found.z, lse), 0.0)
        if need_rows:
            rows = torch.cat([_product(p, found, i, head[:vocab_size]) for i, head in enumerate(heads)], 1)
        if need_logits:
            logits = torch.stack([(p * part).sum(1) for part in found.parts], 1)
    return torch.where(keep, logp, 0.0), torch.where(keep, lse, 0.0), rows, logits


def probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse); a row of -inf has no mass."""
    return (z - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(1)).exp()


def _product(g: Tensor, found: Fused, i: int, head: Tensor) -> Tensor:
    """sum_v g_tv cap'_i,tv W_i,v."""
    return (g if found.slopes is None else g * found.slopes[i]) @ head.to(g.dtype)


def linear_fusion_sample(
    hiddens: Sequence[Tensor],
    heads: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Tensor | None,
    weight_values: Sequence[float],
    temperature: float,
    softcap: float,
    vocab_size: int,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token int64, logprob, lse and kept int32 (tokens with finite z), each ``[T]``; see `fused_sample` for the draw.

    Temperature 0 takes the largest z (smallest index of ties) at temperature 1, kept 1. A row whose lse is not finite
    gives token -1, logprob NaN, kept 0.
    """
    greedy = temperature == 0
    z = fused(hiddens, heads, biases, weights, weight_values, 1.0 if greedy else temperature, softcap, vocab_size).z
    lse = log_sum_exp(z)
    if greedy:
        token = (z == z.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
        kept = torch.ones_like(token)
    else:
        finite = z > -torch.inf
        token, kept = draw(z, finite, uniform), finite.sum(-1)
    logprob = z.gather(1, token.unsqueeze(1)).squeeze(1) - lse
    fine = torch.isfinite(lse)
    return (
        torch.where(fine, token, -1),
        torch.where(fine, logprob, torch.nan),
        lse,
        torch.where(fine, kept, 0).to(torch.int32),
    )
