"""compressed_attention: softmax attention that is at its best with few keys and with head sizes such as 72."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.kv_compressed_attention import compressed_attention as reference
from ...reference.numerics import accumulate_dtype
from ..layout import unit_stride
from ..output import copy_out

MAX_HEAD = 256


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((2, b, h, n), dtype=accumulate_dtype(q, k, v))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Tensor, scale: float, need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    empty = (0,)
    return (
        q.new_empty(q.shape if need_q else empty),
        k.new_empty(k.shape if need_kv else empty),
        v.new_empty(v.shape if need_kv else empty),
    )


COMPRESSED_ATTENTION_BACKWARD = define(
    reference.compressed_attention_backward,
    fake=_fake_backward,
    triton=Kernel("compressed_attention_backward", rowwise="grad q k v"),
)


def _backward(call: Call, grads: reference.Attended) -> dict[str, Any]:
    needs = call.needs
    made = COMPRESSED_ATTENTION_BACKWARD.on(call.backend)(
        unit_stride(grads.out), call.q, call.k, call.v, call.out.out, call.out.softmax, call.scale, needs.q,
        needs.k or needs.v,
    )  # fmt: skip
    return {name: getattr(made, f"d{name}") for name in "qkv" if getattr(needs, name)}


COMPRESSED_ATTENTION = define(
    reference.compressed_attention,
    fake=_fake,
    backward=_backward,
    saves="q k v out softmax",
    carriers="out",
    triton=Kernel(rowwise="q k v"),
)


def _inputs(op: str, q: Any, k: Any, v: Any, layout: str) -> list[Tensor]:
    """q, k, v checked, as [B, tokens, H, D]."""
    checks.choice(op, "layout", layout, ("bnhd", "bhnd"))
    names = " ".join(layout.upper())
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.is_float_tensor(op, name, t)
        if t.ndim != 4:
            checks.fail(op, name, f"of four dimensions, {names}", tuple(t.shape))
        if t.dtype != q.dtype:
            checks.fail(op, name, f"of the dtype of q ({q.dtype})", t.dtype, error=TypeError)
    checks.same_device(op, [("q", q), ("k", k), ("v", v)])
    found = [t if layout == "bnhd" else t.transpose(1, 2) for t in (q, k, v)]
    b, n, h, d = found[0].shape
    if not 1 <= d <= MAX_HEAD or n < 1 or h < 1:
        checks.fail(op, "q", f"of N >= 1 queries, 1 or more heads and a head size D in [1, {MAX_HEAD}]", tuple(q.shape))
    for name, t in zip("kv", found[1:], strict=True):
        if (t.shape[0], t.shape[2], t.shape[3]) != (b, h, d) or t.shape[1] < 1:
            checks.fail(op, name, f"of B = {b}, H = {h}, D = {d} like q and M >= 1 keys", tuple(t.shape))
    if found[2].shape != found[1].shape:
        checks.fail(op, "v", f"of the shape of k {tuple(k.shape)}", tuple(v.shape))
    return [unit_stride(t) for t in found]


def scale_of(op: str, scale: Any, head: int) -> float:
    """``scale``, by default D^-0.5."""
    return float(head) ** -0.5 if scale is None else checks.number(op, "scale", scale)


def log_sum(softmax: Tensor) -> Tensor:
    """lse [B, H, N] of the two numbers a row that the ops keep."""
    return softmax[0] + softmax[1].log()


def _plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, layout: str = "bnhd") -> Any:
    if layout != "bnhd":
        return NotImplemented
    found = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return found.transpose(1, 2).contiguous()


@or_plain(_plain, replayed=True)
def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    layout: str = "bnhd",
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of N queries over M keys, usually M much smaller than N; no mask, no dropout.

    ``out = softmax(scale Q K^T) V`` a head. Any head size up to 256 without padding copies: 72 costs 72. Scores,
    softmax and sums are float32 inside (float64 for float64), so 16-bit inputs need no float32 copies against overflow.

    Args:
        q: queries ``(B, N, H, D)``; float32, bfloat16, float16 or float64; strides free (the last dimension is copied
            unless contiguous), so views of a packed qkv are read in place.
        k: keys ``(B, M, H, D)``, dtype of q.
        v: values ``(B, M, H, D)``, dtype of q.
        scale: of the scores; default D^-0.5.
        layout: ``"bnhd"`` as above, or ``"bhnd"``: ``(B, H, N, D)`` and ``(B, H, M, D)``, as
            `torch.nn.functional.scaled_dot_product_attention` takes them.
        return_lse: also return the natural log of the sum of exponentials of each row's scaled scores.
        out: tensor of the result's shape and dtype to write to; no gradient then.

    Returns:
        The result in the shape of q (a contiguous ``(B, N, H, D)`` underneath); with ``return_lse`` also lse
        ``(B, H, N)``, float32, not differentiable. Differentiable, once, in q, k, v. Deterministic. Keeps q, k, v, the
        result and 2 floats a row for backward, never an N x M matrix.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> q, k, v = torch.zeros(1, 3, 1, 2), torch.randn(1, 2, 1, 2), torch.tensor([[[[1., 2.]], [[3., 6.]]]])
        >>> w2s_fast.compressed_attention(q, k, v)[0, 0]
        tensor([[2., 4.]])
    """
    op = "compressed_attention"
    q, k, v = autocast.linear(q, k, v)
    q_, k_, v_ = _inputs(op, q, k, v, layout)
    found, softmax = COMPRESSED_ATTENTION(q_, k_, v_, scale_of(op, scale, q_.shape[3]))
    found = copy_out(op, out, found if layout == "bnhd" else found.transpose(1, 2), (q, k, v))
    return (found, log_sum(softmax)) if return_lse else found
