"""Softmax attention without a mask, for any number of keys and any head size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O = softmax(scale Q K^T) V ``[B, N, H, D]`` and lse ``[B, H, N]``, the natural log of sum exp of a row's scores.

    q ``[B, N, H, D]``, k and v ``[B, M, H, D]``.
    """
    acc = accumulate_dtype(q, k, v)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(acc), k.to(acc)) * scale
    lse = scores.logsumexp(-1)
    p = (scores - lse.unsqueeze(-1)).exp()
    return torch.einsum("bhnm,bmhd->bnhd", p, v.to(acc)).to(q.dtype).contiguous(), lse


def compressed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, need_q: bool, need_kv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (``[0]`` where not needed) of `compressed_attention`.

    P = exp(S - lse); dV = P^T dO; dP = dO V^T; dS = P (dP - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q.
    """
    dq, dk, dv = attention_gradients(grad, q, k, v, out, lse, scale)
    empty = q.new_empty(0)
    return (
        dq.to(q.dtype) if need_q else empty,
        dk.to(k.dtype) if need_kv else empty,
        dv.to(v.dtype) if need_kv else empty.clone(),
    )


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `compressed_attention` in the accumulation dtype."""
    acc = accumulate_dtype(q, k, v)
    grad, q, k, v, out = (t.to(acc) for t in (grad, q, k, v, out))
    p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - lse.to(acc).unsqueeze(-1)).exp()
    delta = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bnhd,bmhd->bhnm", grad, v) - delta) * scale
    return (
        torch.einsum("bhnm,bmhd->bnhd", ds, k).contiguous(),
        torch.einsum("bhnm,bnhd->bmhd", ds, q).contiguous(),
        torch.einsum("bhnm,bnhd->bmhd", p, grad).contiguous(),
    )
