"""The whole path: packed qkv in, keys and values compressed, attention, heads side by side out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .compressed_attention import attention_gradients, compressed_attention
from .kv_compress import kv_compress, kv_compress_backward


def kv_compressed_attention(
    qkv: Tensor,
    height: int,
    width: int,
    ratio: int,
    mode: str,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out ``[B, N, C]``, softmax ``[2, B, H, N]``, kv ``[B, M, 2, C]`` and the LayerNorm's stats of qkv ``[B, N, 3,
    C]``.

    kv = `kv_compress` of slots 1 and 2 (``[0]`` with ratio 1: k and v as they are); out = `compressed_attention`.
    """
    q, kv, stats = qkv[:, :, 0], qkv[:, :, 1:], qkv.new_empty(0, dtype=accumulate_dtype(qkv))
    if ratio > 1:
        kv, stats = kv_compress(
            qkv, 1, height, width, ratio, mode, weight, bias, normalize, norm_weight, norm_bias, eps
        )
    shape = (num_heads, qkv.shape[-1] // num_heads)
    q, k, v = (t.unflatten(-1, shape) for t in (q, kv[:, :, 0], kv[:, :, 1]))
    out, softmax = compressed_attention(q, k, v, scale)
    return out.flatten(2), softmax, kv if ratio > 1 else qkv.new_empty(0), stats


def kv_compressed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    height: int,
    width: int,
    ratio: int,
    mode: str,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_heads: int,
    scale: float,
    out: Tensor,
    softmax: Tensor,
    kv: Tensor,
    stats: Tensor,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dqkv ``[B, N, 3, C]`` and dweight, dbias, dnorm_weight, dnorm_bias as in `kv_compress_backward`; dk' and dv' pass
    from one gradient to the other in the accumulation dtype."""
    shape = (num_heads, qkv.shape[-1] // num_heads)
    keys = kv if ratio > 1 else qkv[:, :, 1:]
    views = (grad, qkv[:, :, 0], keys[:, :, 0], keys[:, :, 1], out)
    g, q, k, v, o = (t.unflatten(-1, shape) for t in views)
    dq, dk, dv = (t.flatten(2) for t in attention_gradients(g, q, k, v, o, softmax, scale))
    empty = dq.new_empty(0)
    if ratio == 1:
        return torch.stack((dq, dk, dv), 2).to(qkv.dtype), empty, empty.clone(), empty.clone(), empty.clone()
    dx, *params = kv_compress_backward(
        torch.stack((dk, dv), 2), qkv, 1, height, width, ratio, mode, weight, bias, normalize, norm_weight, norm_bias,
        stats, True, need_params,
    )  # fmt: skip
    dx[:, :, 0] = dq.to(dx.dtype)
    return (dx, *params)  # type: ignore[return-value]
