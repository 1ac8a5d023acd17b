"""Compression of keys and values: a window of R x R tokens becomes one.

Slots ``first`` and later of x (the k and v of a packed qkv) are compressed alike; G of them, M tokens each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .arguments import SUMS, Compression


def _windows(z: Tensor, given: Compression) -> Tensor:
    """[B, N, G, C] as [B, M, R, R, G, C]: the tokens of each window."""
    (b, _, g, c), height, width, ratio = z.shape, given.height, given.width, given.ratio
    h, w = height // ratio, width // ratio
    grid = z.reshape(b, height, width, g, c)[:, : h * ratio, : w * ratio]
    grid = grid.reshape(b, h, ratio, w, ratio, g, c).transpose(2, 3)
    return grid.reshape(b, h * w, ratio, ratio, g, c)


def _pick(z: Tensor, given: Compression) -> Tensor:
    """The kept tokens of z [B, N, ...]: every R-th, or the top left of each window; a view where it can be."""
    height, width, ratio = given.height, given.width, given.ratio
    if given.mode == "stride":
        return z[:, ::ratio]
    h, w = height // ratio, width // ratio
    grid = z.reshape(z.shape[0], height, width, *z.shape[2:])[:, : h * ratio : ratio, : w * ratio : ratio]
    return grid.reshape(z.shape[0], h * w, *z.shape[2:])


class Compressed(NamedTuple):
    """kv ``[B, M, G, C]`` and stats ``[B, M, G, 2]`` (mean, 1/s; ``[0]`` without normalize)."""

    kv: Tensor
    stats: Tensor


def kv_compress(x: Tensor, first: int, given: Compression, eps: float) -> Compressed:
    """kv ``[B, M, G, C]`` and stats ``[B, M, G, 2]`` (mean, 1/s; ``[0]`` without normalize) of x ``[B, N, S, C]``.

    a_mc = b_c + sum_ij w_cij z_(Ry+i)W+(Rx+j),c (conv; mean: w = 1/R^2; uniform, nearest: token (Ry, Rx); stride: token
    R m), then LayerNorm over c with weight and bias if ``normalize``. weight ``[1 or G, C, R, R]``, bias ``[1 or G,
    C]``.
    """
    acc = accumulate_dtype(x)
    a = _sums(x[:, :, first:].to(acc), given)
    if not given.normalize:
        return Compressed(a.to(x.dtype), a.new_empty(0))
    unit, stats = standardize(a, eps)
    out = unit if given.norm_weight is None else unit * given.norm_weight.to(acc)
    out = out if given.norm_bias is None else out + given.norm_bias.to(acc)
    return Compressed(out.to(x.dtype), stats)


def _sums(z: Tensor, given: Compression) -> Tensor:
    weight, bias = given.weight, given.bias
    if given.mode not in SUMS:
        return _pick(z, given).contiguous()
    windows = _windows(z, given)
    if weight is None:
        a = windows.mean((2, 3))
    else:
        a = torch.einsum("bmijgc,gcij->bmgc", windows, weight.to(z.dtype).expand(z.shape[2], -1, -1, -1))
    return a.contiguous() if bias is None else a + bias.to(z.dtype)


def standardize(a: Tensor, eps: float, rms: bool = False) -> tuple[Tensor, Tensor]:
    """(a - mean) / s over the last dimension, s^2 = biased variance + eps, and (mean, 1/s); rms leaves the mean out."""
    mean = torch.zeros_like(a[..., :1]) if rms else a.mean(-1, keepdim=True)
    centred = a - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, torch.cat((mean, rstd), -1)


def standardize_backward(g: Tensor, unit: Tensor, rstd: Tensor, rms: bool = False) -> Tensor:
    """da = (g - mean g - unit mean(g unit)) / s; rms leaves the first mean out."""
    inner = g - unit * (g * unit).mean(-1, keepdim=True)
    return rstd * (inner if rms else inner - g.mean(-1, keepdim=True))


class CompressGradients(NamedTuple):
    """dx like x, and those of the parameters."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dnorm_weight: Tensor
    dnorm_bias: Tensor


def kv_compress_backward(
    grad: Tensor, x: Tensor, first: int, given: Compression, stats: Tensor, need_x: bool, need_params: bool
) -> CompressGradients:
    """Gradients of `kv_compress`: dx ``[B, N, S, C]`` (0 in slots before ``first`` and in tokens without a window), and
    dweight, dbias, dnorm_weight, dnorm_bias in the shape of their parameter; ``[0]`` where absent or not needed.

    dbeta = sum dk', dgamma = sum dk' unit, da through the LayerNorm, db = sum da, dw = sum da z, dz = w da.
    """
    acc = accumulate_dtype(x)
    weight, bias, norm_weight, norm_bias = given.parameters.values()
    g, z = grad.to(acc), x[:, :, first:].to(acc)
    empty = g.new_empty(0)
    d_norm_weight = d_norm_bias = dw = db = dx = empty
    if given.normalize:
        mean, rstd = stats[..., :1], stats[..., 1:]
        unit = (_sums(z, given) - mean) * rstd
        if need_params and norm_weight is not None:
            d_norm_weight = (g * unit).sum((0, 1, 2))
        if need_params and norm_bias is not None:
            d_norm_bias = g.sum((0, 1, 2))
        g = standardize_backward(g if norm_weight is None else g * norm_weight.to(acc), unit, rstd)
    shared = need_params and bias is not None and bias.shape[0] == 1
    if need_params and bias is not None:
        db = g.sum((0, 1, 2))[None] if shared else g.sum((0, 1))
    if need_params and weight is not None:
        dw = torch.einsum("bmijgc,bmgc->gcij", _windows(z, given), g)
        dw = dw.sum(0, keepdim=True) if weight.shape[0] == 1 else dw
    if need_x:
        dx = torch.zeros(x.shape, dtype=acc, device=x.device)
        _spread(dx[:, :, first:], g, given)
    return CompressGradients(dx.to(x.dtype), dw, db, d_norm_weight, d_norm_bias)


def _spread(dz: Tensor, g: Tensor, given: Compression) -> None:
    """dz_token = w da of its window, written into ``dz``, which is 0."""
    height, width, ratio, mode, weight = given.height, given.width, given.ratio, given.mode, given.weight
    if mode == "stride":
        dz[:, ::ratio] = g
        return
    h, w = height // ratio, width // ratio
    grid = dz.unflatten(1, (height, width))[:, : h * ratio, : w * ratio]
    g = g.unflatten(1, (h, w))
    for i in range(ratio if mode in SUMS else 1):
        for j in range(ratio if mode in SUMS else 1):
            tap = 1.0 if mode not in SUMS else 1.0 / ratio**2 if weight is None else weight[:, :, i, j].to(g.dtype)
            grid[:, i::ratio, j::ratio] = g * tap
