"""kv_compress: a window of R x R keys and values becomes one, and the LayerNorm that follows, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.kv_compressed_attention import kv_compress as reference
from ...reference.kv_compressed_attention.arguments import Compression
from ...reference.numerics import accumulate_dtype
from ..layout import unit_stride
from ..output import copy_out
from .inputs import compression, fake_parameters, heads, packed, parameter_gradients, wanted


def _fake(x: Tensor, first: int, given: Compression, eps: float) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], given.tokens, x.shape[2] - first)
    return (
        x.new_empty((*shape, x.shape[3])),
        x.new_empty((*shape, 2) if given.normalize else (0,), dtype=accumulate_dtype(x)),
    )


def _fake_backward(
    grad: Tensor, x: Tensor, first: int, given: Compression, stats: Tensor, need_x: bool, need_params: bool
) -> tuple[Tensor, ...]:
    dx = x.new_empty(x.shape if need_x else (0,))
    return (dx, *fake_parameters(given, accumulate_dtype(x), need_params, x))


KV_COMPRESS_BACKWARD = define(
    reference.kv_compress_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="grad x"),
)


def _backward(call: Call, grads: reference.Compressed) -> dict[str, Any]:
    given, needs = call.given, call.needs
    made = KV_COMPRESS_BACKWARD.on(call.backend)(
        unit_stride(grads.kv), call.x, call.first, given, call.out.stats, needs.x, wanted(needs)
    )
    return {"x": made.dx if needs.x else None, **parameter_gradients(given, made)}


KV_COMPRESS = define(
    reference.kv_compress,
    fake=_fake,
    backward=_backward,
    saves="x weight bias norm_weight norm_bias stats",
    carriers="kv",
    triton=Kernel(rowwise="x"),
)


def kv_compress(
    qkv: Tensor,
    grid: tuple[int, int],
    ratio: int,
    *,
    mode: str = "conv",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool | None = None,
    num_heads: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compress the keys and values of a packed qkv: R x R neighbouring tokens become one, in one pass over both.

    With token n = h W + w and M = floor(H / R) floor(W / R) windows m = y floor(W / R) + x (PixArt-Sigma, arXiv
    2403.04692): ``a[m, c] = b[c] + sum_ij w[c, i, j] z[(R y + i) W + R x + j, c]``, then
    ``k'[m] = norm_weight (a[m] - mean) / sqrt(var + eps) + norm_bias`` over the channels; v the same. Windows that do
    not fit are dropped; their tokens get no gradient through k and v. With ratio 1 nothing is done and nothing copied.

    Args:
        qkv: ``(B, N, 3C)`` or ``(B, N, 3, C)``, q, k, v in this order; float32, bfloat16, float16 or float64; last
            dimension contiguous, other strides free.
        grid: (H, W) with H W = N.
        ratio: R, 1 to min(H, W) (``"stride"``: to N).
        mode: ``"conv"`` as above; ``"mean"`` of the window; ``"uniform"`` the window's top-left token; ``"nearest"``
            the same (the official "ave", which averages nothing); ``"stride"`` every R-th token of the sequence,
            M = ceil(N / R).
        weight: taps ``(C, 1, R, R)`` or ``(C, R, R)``, or ``(2, C, R, R)`` with taps of their own for k and v. In mode
            conv only, and needed there.
        bias: ``(C,)`` or ``(2, C)``, in mode conv only.
        norm_weight: ``(C,)``, the LayerNorm's gain; None is 1.
        norm_bias: ``(C,)``, the LayerNorm's offset; None is 0.
        eps: the LayerNorm's.
        normalize: whether the LayerNorm follows; default only in mode conv.
        num_heads: divide C into heads.
        out: ``(B, M, 2, C)`` to write to; no gradient then.

    Returns:
        (k, v), views of one ``(B, M, 2, C)`` buffer: ``(B, M, C)``, or ``(B, M, num_heads, C / num_heads)``.
        Differentiable, once, in qkv (one packed gradient, written once) and the parameters, whose gradients are summed
        in float32 in a fixed order. Arithmetic is float32 (float64 for float64). Deterministic. Keeps 2 floats a
        compressed token. On a CPU the memory of a gradient above 32 MiB is kept, once freed, for the next of its size.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> qkv = torch.arange(16.0).view(1, 16, 1).repeat(1, 1, 3)
        >>> k, v = w2s_fast.kv_compress(qkv, (4, 4), 2, mode="mean")
        >>> k[0, :, 0]
        tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    op = "kv_compress"
    (qkv,) = autocast.linear(qkv)
    x = packed(op, qkv)
    given = compression(op, x, grid, ratio, mode, weight, bias, norm_weight, norm_bias, normalize)
    eps = checks.number(op, "eps", eps, low=0.0)
    shape = (x.shape[3],) if num_heads is None else (heads(op, num_heads, x.shape[3]), -1)
    kv = x[:, :, 1:] if given.ratio == 1 else KV_COMPRESS(x, 1, given, eps).kv
    k, v = copy_out(op, out, kv, (qkv, *given.parameters.values())).unbind(2)
    return (k, v) if num_heads is None else (k.unflatten(2, shape), v.unflatten(2, shape))
