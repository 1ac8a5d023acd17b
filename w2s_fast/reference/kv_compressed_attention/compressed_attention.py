"""Softmax attention without a mask, for any number of keys and any head size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


class Attended(NamedTuple):
    """out ``[B, N, H, D]`` and softmax ``[2, B, H, N]``."""

    out: Tensor
    softmax: Tensor


class AttentionGradients(NamedTuple):
    """Each like its argument, ``[0]`` where not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Attended:
    """O = softmax(scale Q K^T) V ``[B, N, H, D]`` and softmax ``[2, B, H, N]``: a row's largest score and the sum of
    exponentials above it.

    q ``[B, N, H, D]``, k and v ``[B, M, H, D]``. The two numbers are kept apart because their lse is rounded where
    scores are large, and exp(S - lse) would be off by that.
    """
    acc = accumulate_dtype(q, k, v)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(acc), k.to(acc)) * scale
    top = scores.amax(-1, keepdim=True)
    e = (scores - top).exp()
    total = e.sum(-1, keepdim=True)
    out = torch.einsum("bhnm,bmhd->bnhd", e / total, v.to(acc)).to(q.dtype)
    return Attended(out.contiguous(), torch.stack((top.squeeze(-1), total.squeeze(-1))))


def compressed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax: Tensor,
    scale: float,
    need_q: bool,
    need_kv: bool,
) -> AttentionGradients:
    """dq, dk, dv (``[0]`` where not needed) of `compressed_attention`.

    P = exp(S - top) / total; dV = P^T dO; dP = dO V^T; dS = P (dP - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q.
    """
    dq, dk, dv = attention_gradients(grad, q, k, v, out, softmax, scale)
    empty = q.new_empty(0)
    return AttentionGradients(
        dq.to(q.dtype) if need_q else empty,
        dk.to(k.dtype) if need_kv else empty,
        dv.to(v.dtype) if need_kv else empty.clone(),
    )


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `compressed_attention` in the accumulation dtype."""
    acc = accumulate_dtype(q, k, v)
    grad, q, k, v, out = (t.to(acc) for t in (grad, q, k, v, out))
    top, total = softmax.to(acc).unsqueeze(-1)
    p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - top).exp() / total
    delta = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bnhd,bmhd->bhnm", grad, v) - delta) * scale
    return (
        torch.einsum("bhnm,bmhd->bnhd", ds, k).contiguous(),
        torch.einsum("bhnm,bnhd->bmhd", ds, q).contiguous(),
        torch.einsum("bhnm,bnhd->bmhd", p, grad).contiguous(),
    )
