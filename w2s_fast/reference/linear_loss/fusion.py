"""Fused linear heads: z_t = (1/temperature) sum_i w_ti cap(W_i h_ti + b_i), cap(x) = softcap tanh(x / softcap).

These are definitions: they hold the whole [T, V] matrix that the kernels never form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_fusion.arguments import Drawn
from ..logit_fusion.sample import draw
from ..numerics import log_sum_exp
from .arguments import Linear


class Fused(NamedTuple):
    """The fused logits and their parts.

    Fields: z ``[T, V]``; parts, n of ``[T, V]``: cap(W_i h_i + b_i); slopes, their derivatives cap'(.) (None without a
    softcap); scale ``[T, n]`` or ``[1, n]``: w / temperature.
    """

    z: Tensor
    parts: list[Tensor]
    slopes: list[Tensor] | None
    scale: Tensor


def fused(model: Linear) -> Fused:
    """z in float32 (float64 if any hidden or head is), for the first ``vocab_size`` rows of every head.

    ``biases`` is empty or n tensors; ``weights`` is ``[T, n]`` or None (then ``weight_values``); softcap 0 is none.
    """
    dtype, width = model.accumulate, model.vocab_size
    parts = []
    for i, (h, head) in enumerate(zip(model.hiddens, model.heads, strict=True)):
        x = h.to(dtype) @ head[:width].to(dtype).t()
        parts.append(x + model.biases[i][:width].to(dtype) if model.biases else x)
    slopes = None
    if model.softcap:
        unit = [torch.tanh(x / model.softcap) for x in parts]
        parts, slopes = [model.softcap * u for u in unit], [1 - u.square() for u in unit]
    if model.weights is None:
        scale = torch.tensor([list(model.weight_values)], dtype=dtype, device=model.hiddens[0].device)
    else:
        scale = model.weights.to(dtype)
    scale = scale / model.temperature
    z = scale[:, :1] * parts[0]
    for i in range(1, len(parts)):
        z = z + scale[:, i : i + 1] * parts[i]
    return Fused(z, parts, slopes, scale)


class LogProbs(NamedTuple):
    """logp and lse ``[T]``, mean_rows ``[T, sum D_i]``, mean_logits ``[T, n]`` and kept, ``[0]`` unless needed."""

    logp: Tensor
    lse: Tensor
    mean_rows: Tensor
    mean_logits: Tensor
    kept: Tensor


def laid_up(z: Tensor) -> Tensor:
    """Logits ``[T, V]`` as a forward pass keeps them for its backward: ``[V, T]``, T rounded up to a multiple of 16."""
    return torch.nn.functional.pad(z.t(), (0, -z.shape[0] % 16)).contiguous()


def linear_fusion_logprobs(
    model: Linear, target: Tensor, ignore_index: int, need_rows: bool, need_logits: bool, need_kept: bool
) -> LogProbs:
    """logp_t = z_t,y - lse_t and lse_t ``[T]``, and, if needed, expectations under p = softmax(z).

    mean_rows ``[T, sum D_i]`` = sum_v p_tv cap'_i,tv W_i,v (the models side by side), mean_logits ``[T, n]`` =
    sum_v p_tv cap(.)_i,tv; each ``[0]`` unless needed. Rows with target = ignore_index are 0 everywhere. kept: the
    logits as `laid_up`, for backward; every row counts then.
    """
    found = fused(model)
    keep = target != ignore_index
    lse = log_sum_exp(found.z)
    logp = found.z.gather(1, torch.where(keep, target, 0).unsqueeze(1)).squeeze(1) - lse
    rows, logits = found.z.new_empty(0), found.z.new_empty(0)
    if need_rows or need_logits:
        p = torch.where(keep.unsqueeze(1), probabilities(found.z, lse), 0.0)
        if need_rows:
            rows = torch.cat([_product(p, found, i, head[: model.vocab_size]) for i, head in enumerate(model.heads)], 1)
        if need_logits:
            logits = torch.stack([(p * part).sum(1) for part in found.parts], 1)
    kept = laid_up(found.z) if need_kept else found.z.new_empty(0)
    return LogProbs(torch.where(keep, logp, 0.0), torch.where(keep, lse, 0.0), rows, logits, kept)


def probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse); a row of -inf has no mass."""
    return (z - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(1)).exp()


def _product(g: Tensor, found: Fused, i: int, head: Tensor) -> Tensor:
    """sum_v g_tv cap'_i,tv W_i,v."""
    return (g if found.slopes is None else g * found.slopes[i]) @ head.to(g.dtype)


def linear_fusion_sample(model: Linear, uniform: Tensor) -> Drawn:
    """token int64, logprob, lse and kept int32 (tokens with finite z), each ``[T]``; see `fused_sample` for the draw.

    Temperature 0 takes the largest z (smallest index of ties) at temperature 1, kept 1. A row whose lse is not finite
    gives token -1, logprob NaN, kept 0.
    """
    greedy = model.temperature == 0
    z = fused(model._replace(temperature=1.0) if greedy else model).z
    lse = log_sum_exp(z)
    if greedy:
        token = (z == z.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
        kept = torch.ones_like(token)
    else:
        finite = z > -torch.inf
        token, kept = draw(z, finite, uniform), finite.sum(-1)
    logprob = z.gather(1, token.unsqueeze(1)).squeeze(1) - lse
    fine = torch.isfinite(lse)
    return Drawn(
        torch.where(fine, token, -1),
        torch.where(fine, logprob, torch.nan),
        lse,
        torch.where(fine, kept, 0).to(torch.int32),
    )
