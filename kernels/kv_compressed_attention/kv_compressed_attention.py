"""The whole path on a GPU: compression, attention on views of qkv; backward writes one packed dqkv.

dq goes straight into slot 0 of dqkv, dk' and dv' stay float32 between the two gradients, the compression's gradient
writes slots 1 and 2. The kernels are those of kv_compress.py, compressed_attention.py and its backward.
"""

from __future__ import annotations

from typing import Any

from ..common import AotCase, Meta, dtype
from .compressed_attention import attention
from .compressed_attention_backward import gradients, summed
from .kv_compress import backward_into, compression_of, launch_kv_compress

__all__ = ["aot_cases", "launch_kv_compressed_attention", "launch_kv_compressed_attention_backward"]


def _heads(t: Any, slot: int, heads: int) -> Any:
    """Slot of [B, tokens, S, C] as [B, tokens, H, D]."""
    return t[:, :, slot].unflatten(-1, (heads, t.shape[-1] // heads))


def launch_kv_compressed_attention(
    qkv: Any, given: Any, eps: float, num_heads: int, scale: float
) -> tuple[Any, Any, Any, Any]:
    """Arguments of `kv_compressed_attention` -> (out, softmax, kv, stats)."""
    heads = num_heads
    batch, n, _, c = qkv.shape
    f32 = dtype(qkv, "float32")
    kv, stats, keys, first = qkv.new_empty((0,)), qkv.new_empty((0,), dtype=f32), qkv, 1
    if given.ratio > 1:
        kv, stats = launch_kv_compress(qkv, 1, given, eps)
        keys, first = kv, 0
    out = qkv.new_empty((batch, n, c))
    softmax = qkv.new_empty((2, batch, heads, n), dtype=f32)
    views = (_heads(qkv, 0, heads), _heads(keys, first, heads), _heads(keys, first + 1, heads))
    attention(*views, scale, out.unflatten(-1, (heads, c // heads)), softmax)
    return out, softmax, kv, stats


def launch_kv_compressed_attention_backward(
    grad: Any, qkv: Any, given: Any, num_heads: int, scale: float, out: Any, softmax: Any, kv: Any, stats: Any,
    need_params: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `kv_compressed_attention_backward` -> (dqkv, dweight, dbias, dnorm_weight, dnorm_bias)."""
    batch, c, heads, compressed = qkv.shape[0], qkv.shape[3], num_heads, given.ratio > 1
    keys, first = (kv, 0) if compressed else (qkv, 1)
    dqkv = _packed(qkv, given) if compressed else qkv.new_empty(qkv.shape)
    shape = (heads, c // heads)
    views = (grad.unflatten(-1, shape), *(_heads(t, s, heads) for t, s in ((qkv, 0), (keys, first), (keys, first + 1))))
    dk, dv = gradients(*views, out.unflatten(-1, shape), softmax, scale, _heads(dqkv, 0, heads), True)
    dk, dv = summed(dk, batch).flatten(2), summed(dv, batch).flatten(2)
    if not compressed:
        dqkv[:, :, 1].copy_(dk)
        dqkv[:, :, 2].copy_(dv)
        empty = qkv.new_empty((0,), dtype=dtype(qkv, "float32"))
        return (dqkv, empty, empty.clone(), empty.clone(), empty.clone())
    dkv = dk.new_empty((*dk.shape[:2], 2, c))
    dkv[:, :, 0].copy_(dk)
    dkv[:, :, 1].copy_(dv)
    return (dqkv, *backward_into(dkv, qkv, 1, given, stats, dqkv, need_params))


def _packed(qkv: Any, given: Any) -> Any:
    """Room for dqkv, 0 where the kernels write nothing; slot 0 is written by the attention's gradient."""
    covered = given.mode in ("conv", "mean") and given.height % given.ratio == 0 and given.width % given.ratio == 0
    return qkv.new_empty(qkv.shape) if covered else qkv.new_zeros(qkv.shape)


def aot_cases() -> list[AotCase]:
    """The compression on a packed qkv; the other launches are those of the modules this one puts together."""
    qkv, vector = Meta((2, 16384, 3, 1152), "bfloat16"), Meta((1152,), "bfloat16")
    taps, bias = Meta((1, 1152, 2, 2), "bfloat16"), Meta((1, 1152), "bfloat16")
    given = compression_of(128, 128, 2, "conv", taps, bias, vector)
    return [AotCase("bf16-16k", lambda: launch_kv_compress(qkv, 1, given, 1e-5))]
