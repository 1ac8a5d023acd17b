"""fold_kv_projection: for inference, compress before the projection, or project and compress in one product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import autocast, checks, transforms
from ...reference.kv_compressed_attention.arguments import MODES, Compression
from ..layout import unit_stride
from .kv_compress import KV_COMPRESS


class FoldedKV(NamedTuple):
    """A folded projection; call it with (x ``(B, N, C)``, grid) for q ``(B, N, C)``, k and v ``(B, M, C)``.

    Fields: q_weight ``(C, C_in)``, q_bias; kv_weight ``(2C, C_in)``, or ``(2C, R^2 C_in)`` with ``merged`` taps,
    kv_bias; ratio; mode; merged.
    """

    q_weight: Tensor
    q_bias: Tensor | None
    kv_weight: Tensor
    kv_bias: Tensor | None
    ratio: int
    mode: str
    merged: bool

    def __call__(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v); the LayerNorm that may follow is not part of it."""
        checks.is_float_tensor("FoldedKV", "x", x)
        height, width = grid
        if x.ndim != 3 or x.shape[1] != height * width:
            checks.fail("FoldedKV", "x", f"of shape (B, {height} * {width}, C)", tuple(x.shape))
        linear = torch.nn.functional.linear
        q = linear(x, self.q_weight, self.q_bias)
        k, v = linear(self._compressed(x, height, width), self.kv_weight, self.kv_bias).chunk(2, -1)
        return q, k, v

    def _compressed(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.merged:
            b, r, h, w = x.shape[0], self.ratio, height // self.ratio, width // self.ratio
            windows = x.unflatten(1, (height, width))[:, : h * r, : w * r].reshape(b, h, r, w, r, -1)
            return windows.transpose(2, 3).reshape(b, h * w, -1)  # type: ignore[no-any-return]
        x = unit_stride(x)
        mode = "mean" if self.mode == "conv" else self.mode
        given = Compression(height, width, self.ratio, mode, None, None, False, None, None)
        found: Tensor = KV_COMPRESS(x.unsqueeze(2), 0, given, 1e-5).kv
        return found.squeeze(2)


def fold_kv_projection(
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    ratio: int,
    mode: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> FoldedKV:
    """Fold a compression of keys and values into the qkv projection before it; exact but for rounding.

    Picking tokens and averaging commute with the projection, so x is compressed and only M tokens are projected: at R =
    2 this saves 10.7 % of the multiplications of all linear layers of a PixArt block. Taps that differ become part of
    one product over a window, ``W'[(i, j, c_in), c] = w[c, i, j] W[c, c_in]``: as many multiplications, but the
    uncompressed keys and values are never written. Not for a projection that a QK norm of k follows.

    Args:
        w_qkv: ``(3C, C_in)``, the weight of the projection to q, k, v.
        b_qkv: ``(3C,)`` or None.
        ratio: R >= 2.
        mode: as in `kv_compress`, except that ``"conv"`` whose taps are all 1 / R^2 is treated as a mean (not
            inside torch.compile).
        weight: ``(C, 1, R, R)`` or ``(C, R, R)``, in mode conv.
        bias: ``(C,)``, in mode conv.

    Returns:
        `FoldedKV`, called with (x, grid) for (q, k, v). The LayerNorm of mode conv has to follow on k and v.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> folded = w2s_fast.fold_kv_projection(torch.randn(12, 4), None, 2, "mean")
        >>> [t.shape[1] for t in folded(torch.randn(1, 16, 4), (4, 4))]
        [16, 4, 4]
    """
    op = "fold_kv_projection"
    checks.is_float_tensor(op, "w_qkv", w_qkv)
    if w_qkv.ndim != 2 or w_qkv.shape[0] % 3:
        checks.fail(op, "w_qkv", "of shape (3C, C_in)", tuple(w_qkv.shape))
    c = w_qkv.shape[0] // 3
    if b_qkv is not None and tuple(checks.is_float_tensor(op, "b_qkv", b_qkv).shape) != (3 * c,):
        checks.fail(op, "b_qkv", f"of shape ({3 * c},)", tuple(b_qkv.shape))
    ratio = checks.integer(op, "ratio", ratio, low=2)
    checks.choice(op, "mode", mode, MODES)
    named = (("b_qkv", b_qkv), ("weight", weight), ("bias", bias))
    checks.same_device(op, [("w_qkv", w_qkv), *((n, t) for n, t in named if isinstance(t, Tensor))])
    if mode != "conv":
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                checks.fail(op, name, f"None in mode {mode!r}", "a tensor")
        return _folded(w_qkv, b_qkv, c, w_qkv[c:], None if b_qkv is None else b_qkv[c:], ratio, mode, False)
    taps, offset = _taps(op, c, ratio, weight, bias)
    # a graph cannot depend on the values of the taps
    if not torch.compiler.is_compiling() and not transforms.active() and bool((taps == 1.0 / ratio**2).all()):
        shift = None if b_qkv is None else b_qkv[c:]
        shift = shift if offset is None else offset.repeat(2) + (0 if shift is None else shift)
        return _folded(w_qkv, b_qkv, c, w_qkv[c:], shift, ratio, mode, False)
    return _merged(w_qkv, b_qkv, c, taps, offset, ratio)


def _folded(w_qkv: Tensor, b_qkv: Tensor | None, c: int, weight: Tensor, bias: Tensor | None, *rest: Any) -> FoldedKV:
    return FoldedKV(w_qkv[:c], None if b_qkv is None else b_qkv[:c], weight, bias, *rest)


def _merged(
    w_qkv: Tensor, b_qkv: Tensor | None, c: int, taps: Tensor, offset: Tensor | None, ratio: int
) -> FoldedKV:
    """The product over a window: columns (i, j, c_in)."""
    twice = taps.repeat(2, 1, 1).to(w_qkv.dtype)
    with autocast.off(w_qkv.device):
        weight = torch.einsum("cij,cd->cijd", twice, w_qkv[c:]).flatten(1)
    shift = None if b_qkv is None else b_qkv[c:] * twice.sum((1, 2))
    if offset is not None:
        shift = offset.repeat(2).to(w_qkv.dtype) + (0 if shift is None else shift)
    return _folded(w_qkv, b_qkv, c, weight, shift, ratio, "conv", True)


def _taps(op: str, c: int, ratio: int, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    checks.is_float_tensor(op, "weight", weight)
    if tuple(weight.shape) not in ((c, 1, ratio, ratio), (c, ratio, ratio)):
        checks.fail(op, "weight", f"of shape ({c}, 1, {ratio}, {ratio}) or ({c}, {ratio}, {ratio})",
                    tuple(weight.shape))  # fmt: skip
    if bias is not None and tuple(checks.is_float_tensor(op, "bias", bias).shape) != (c,):
        checks.fail(op, "bias", f"of shape ({c},)", tuple(bias.shape))
    return weight.reshape(c, ratio, ratio), bias
