"""The whole path: packed qkv in, keys and values compressed, attention, heads side by side out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype
from .arguments import PARAMETERS, Compression
from .compressed_attention import attention_gradients, compressed_attention
from .kv_compress import kv_compress, kv_compress_backward


class CompressedAttended(NamedTuple):
    """out ``[B, N, C]``, softmax ``[2, B, H, N]``, kv ``[B, M, 2, C]`` and stats."""

    out: Tensor
    softmax: Tensor
    kv: Tensor
    stats: Tensor


def kv_compressed_attention(
    qkv: Tensor, given: Compression, eps: float, num_heads: int, scale: float
) -> CompressedAttended:
    """out ``[B, N, C]``, softmax ``[2, B, H, N]``, kv ``[B, M, 2, C]`` and the LayerNorm's stats of qkv ``[B, N, 3,
    C]``.

    kv = `kv_compress` of slots 1 and 2 (``[0]`` with ratio 1: k and v as they are); out = `compressed_attention`.
    """
    q, kv, stats = qkv[:, :, 0], qkv[:, :, 1:], qkv.new_empty(0, dtype=accumulate_dtype(qkv))
    if given.ratio > 1:
        kv, stats = kv_compress(qkv, 1, given, eps)
    shape = (num_heads, qkv.shape[-1] // num_heads)
    q, k, v = (t.unflatten(-1, shape) for t in (q, kv[:, :, 0], kv[:, :, 1]))
    out, softmax = compressed_attention(q, k, v, scale)
    return CompressedAttended(out.flatten(2), softmax, kv if given.ratio > 1 else qkv.new_empty(0), stats)


class CompressedAttentionGradients(NamedTuple):
    """dqkv like qkv, and those of the parameters."""

    dqkv: Tensor
    dweight: Tensor
    dbias: Tensor
    dnorm_weight: Tensor
    dnorm_bias: Tensor


def kv_compressed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    given: Compression,
    num_heads: int,
    scale: float,
    out: Tensor,
    softmax: Tensor,
    kv: Tensor,
    stats: Tensor,
    need_params: bool,
) -> CompressedAttentionGradients:
    """dqkv ``[B, N, 3, C]`` and dweight, dbias, dnorm_weight, dnorm_bias as in `kv_compress_backward`; dk' and dv' pass
    from one gradient to the other in the accumulation dtype."""
    shape = (num_heads, qkv.shape[-1] // num_heads)
    keys = kv if given.ratio > 1 else qkv[:, :, 1:]
    views = (grad, qkv[:, :, 0], keys[:, :, 0], keys[:, :, 1], out)
    g, q, k, v, o = (t.unflatten(-1, shape) for t in views)
    dq, dk, dv = (t.flatten(2) for t in attention_gradients(g, q, k, v, o, softmax, scale))
    empty = dq.new_empty(0)
    if given.ratio == 1:
        none = (empty.clone() for _ in PARAMETERS)
        return CompressedAttentionGradients(torch.stack((dq, dk, dv), 2).to(qkv.dtype), *none)
    made = kv_compress_backward(torch.stack((dk, dv), 2), qkv, 1, given, stats, True, need_params)
    made.dx[:, :, 0] = dq.to(made.dx.dtype)
    return CompressedAttentionGradients(*made)
