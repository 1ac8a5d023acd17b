"""kv_compressed_attention: packed qkv in, compressed keys and values, attention, (B, N, C) out; one packed gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.kv_compressed_attention import kv_compressed_attention as reference
from ...reference.kv_compressed_attention.arguments import Compression
from ...reference.numerics import accumulate_dtype
from ..diffusion.qk_norm import QK_NORM
from ..layout import unit_stride
from ..output import copy_out
from .compressed_attention import MAX_HEAD, log_sum, scale_of
from .inputs import compression, fake_parameters, heads, packed, parameter_gradients, wanted

Affine = tuple[Tensor, Tensor | None]


def _fake(
    qkv: Tensor, given: Compression, eps: float, num_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, (b, n, _, c) = accumulate_dtype(qkv), qkv.shape
    shape = (b, given.tokens, 2)
    return (
        qkv.new_empty((b, n, c)),
        qkv.new_empty((2, b, num_heads, n), dtype=acc),
        qkv.new_empty((*shape, c) if given.ratio > 1 else (0,)),
        qkv.new_empty((*shape, 2) if given.normalize else (0,), dtype=acc),
    )


def _fake_backward(grad: Tensor, qkv: Tensor, given: Compression, *others: Any) -> tuple[Tensor, ...]:
    *_, need_params = others
    return (qkv.new_empty(qkv.shape), *fake_parameters(given, accumulate_dtype(qkv), need_params, qkv))


KV_COMPRESSED_ATTENTION_BACKWARD = define(
    reference.kv_compressed_attention_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="grad qkv"),
)


def _backward(call: Call, grads: reference.CompressedAttended) -> dict[str, Any]:
    given, needs, out = call.given, call.needs, call.out
    made = KV_COMPRESSED_ATTENTION_BACKWARD.on(call.backend)(
        unit_stride(grads.out), call.qkv, given, call.num_heads, call.scale, out.out, out.softmax, out.kv, out.stats,
        wanted(needs),
    )
    return {"qkv": made.dqkv if needs.qkv else None, **parameter_gradients(given, made)}


KV_COMPRESSED_ATTENTION = define(
    reference.kv_compressed_attention,
    fake=_fake,
    backward=_backward,
    saves="qkv weight bias norm_weight norm_bias out softmax kv stats",
    carriers="out",
    triton=Kernel(rowwise="qkv"),
)


def _affine(op: str, name: str, pair: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (weight, bias) pair of [C]."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        checks.fail(op, name, "a pair (weight, bias)", type(pair).__name__, error=TypeError)
    weight, bias = pair
    for part, value in (("weight", weight), ("bias", bias)):
        if part == "bias" and value is None:
            continue
        checks.is_float_tensor(op, f"{name} {part}", value)
        if tuple(value.shape) != (x.shape[3],):
            checks.fail(op, f"{name} {part}", f"of shape ({x.shape[3]},)", tuple(value.shape))
        checks.same_device(op, [("qkv", x), (f"{name} {part}", value)])
    return weight, torch.zeros_like(weight) if bias is None else bias


def _normalized(op: str, x: Tensor, q_norm: Any, k_norm: Any) -> Tensor:
    """x [B, N, 3, C] with q and k normalised over C as asked for."""
    pairs = [_affine(op, n, p, x) for n, p in (("q_norm", q_norm), ("k_norm", k_norm)) if p is not None]
    if not pairs:
        return x
    first, last = int(q_norm is None), 1 + int(k_norm is not None)
    weight, bias = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return QK_NORM(x, first, last, weight, bias, False, 1e-5).y  # type: ignore[no-any-return]


def kv_compressed_attention(
    qkv: Tensor,
    grid: tuple[int, int],
    ratio: int,
    num_heads: int,
    *,
    mode: str = "conv",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool | None = None,
    q_norm: Affine | None = None,
    k_norm: Affine | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of PixArt-Sigma (arXiv 2403.04692) between its projections: QK norm, compression, attention.

    ``k', v' = kv_compress(qkv, ...)``; ``out = softmax(scale q k'^T) v'`` a head, heads side by side again. No
    transposes and no copies: q, k, v are read where they lie, and backward writes one packed dqkv once.

    Args:
        qkv: ``(B, N, 3C)`` or ``(B, N, 3, C)``; float32, bfloat16, float16 or float64; last dimension contiguous.
        grid: (H, W) with H W = N.
        ratio: R; 1 is plain attention.
        num_heads: a divisor of C; C / num_heads at most 256.
        mode: as in `kv_compress`, like the next six.
        weight: taps of the compression.
        bias: of the compression.
        norm_weight: gain of the LayerNorm after it.
        norm_bias: offset of the LayerNorm after it.
        eps: of that LayerNorm.
        normalize: whether it follows; default only in mode conv.
        q_norm: (weight, bias or None) of a LayerNorm of q over all C channels, eps 1e-5, before compression.
        k_norm: the same for k.
        scale: of the scores; default (C / num_heads)^-0.5.
        return_lse: also return the natural log of the sum of exponentials of each row's scaled scores.
        out: ``(B, N, C)`` to write to; no gradient then.

    Returns:
        ``(B, N, C)``; with ``return_lse`` also lse ``(B, num_heads, N)``, float32, not differentiable. Differentiable,
        once, in qkv and the parameters. Deterministic. Keeps qkv, the result, k', v' and 2 floats a row and head for
        backward.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> qkv = torch.zeros(1, 16, 24)
        >>> w2s_fast.kv_compressed_attention(qkv, (4, 4), 2, 2, mode="mean").shape
        torch.Size([1, 16, 8])
    """
    op = "kv_compressed_attention"
    (qkv,) = autocast.linear(qkv)
    x = packed(op, qkv)
    given = compression(op, x, grid, ratio, mode, weight, bias, norm_weight, norm_bias, normalize)
    num_heads = heads(op, num_heads, x.shape[3])
    if x.shape[3] > MAX_HEAD * num_heads:
        checks.fail(op, "num_heads", f"at least C / {MAX_HEAD} (C = {x.shape[3]})", num_heads)
    eps = checks.number(op, "eps", eps, low=0.0)
    factor = scale_of(op, scale, x.shape[3] // num_heads)
    x = _normalized(op, x, q_norm, k_norm)
    made = KV_COMPRESSED_ATTENTION(x, given, eps, num_heads, factor)
    found = copy_out(op, out, made.out, (qkv, *given.parameters.values()))
    return (found, log_sum(made.softmax)) if return_lse else found
