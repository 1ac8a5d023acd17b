"""Normalisation of queries and keys before attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_compressed_attention.kv_compress import standardize, standardize_backward
from ..numerics import accumulate_dtype


class Normed(NamedTuple):
    """y like x, and stats."""

    y: Tensor
    stats: Tensor


class NormGradients(NamedTuple):
    """dx like x; dweight and dbias like their parameters, ``[0]`` where absent."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def qk_norm(
    x: Tensor, first: int, last: int, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float
) -> Normed:
    """y of x ``[B, N, S, C]``: slots [first, last) normalised over C, the others copied; stats ``[B, N, last - first,
    2]``.

    y = weight (x - mean) / s + bias, s^2 = variance + eps (rms: no mean); weight and bias ``[1 or last - first, C]``.
    """
    acc = accumulate_dtype(x)
    unit, stats = standardize(x[:, :, first:last].to(acc), eps, rms)
    unit = unit if weight is None else unit * weight.to(acc)
    unit = unit if bias is None else unit + bias.to(acc)
    y = x.clone(memory_format=torch.contiguous_format)
    y[:, :, first:last] = unit.to(x.dtype)
    return Normed(y, stats)


def qk_norm_backward(
    grad: Tensor,
    x: Tensor,
    first: int,
    last: int,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    stats: Tensor,
    need_params: bool,
) -> NormGradients:
    """dx ``[B, N, S, C]``, dweight and dbias (accumulation dtype, their parameter's shape; ``[0]`` where absent)."""
    acc = accumulate_dtype(x)
    g, mean, rstd = grad[:, :, first:last].to(acc), stats[..., :1], stats[..., 1:]
    unit = (x[:, :, first:last].to(acc) - mean) * rstd
    dweight, dbias = g.new_empty(0), g.new_empty(0)
    if need_params and weight is not None:
        dweight = (g * unit).sum((0, 1))
        dweight = dweight.sum(0, keepdim=True) if weight.shape[0] == 1 else dweight
    if need_params and bias is not None:
        dbias = g.sum((0, 1))
        dbias = dbias.sum(0, keepdim=True) if bias.shape[0] == 1 else dbias
    dx = grad.to(x.dtype).clone(memory_format=torch.contiguous_format)
    through = standardize_backward(g if weight is None else g * weight.to(acc), unit, rstd, rms)
    dx[:, :, first:last] = through.to(x.dtype)
    return NormGradients(dx, dweight, dbias)
