"""qk_norm: LayerNorm or RMSNorm of queries and keys, over all channels or a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.diffusion import qk_norm as reference
from ...reference.numerics import accumulate_dtype
from ..layout import unit_stride


def _fake(x: Tensor, first: int, last: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:2], last - first, 2), dtype=accumulate_dtype(x))


def _fake_backward(
    grad: Tensor, x: Tensor, first: int, last: int, weight: Tensor | None, bias: Tensor | None, rms: bool,
    stats: Tensor, need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = [p.shape if need_params and p is not None else (0,) for p in (weight, bias)]
    return (x.new_empty(x.shape), *(x.new_empty(s, dtype=accumulate_dtype(x)) for s in shapes))  # type: ignore[return-value]


QK_NORM_BACKWARD = define(
    reference.qk_norm_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="grad x"),
)


def _backward(call: Call, grads: reference.Normed) -> dict[str, Any]:
    weight, bias, needs = call.weight, call.bias, call.needs
    made = QK_NORM_BACKWARD.on(call.backend)(
        unit_stride(grads.y), call.x, call.first, call.last, weight, bias, call.rms, call.out.stats,
        needs.weight or needs.bias,
    )  # fmt: skip
    found: dict[str, Any] = {"x": made.dx if needs.x else None}
    if weight is not None and needs.weight:
        found["weight"] = made.dweight.to(weight.dtype)
    if bias is not None and needs.bias:
        found["bias"] = made.dbias.to(bias.dtype)
    return found


QK_NORM = define(
    reference.qk_norm,
    fake=_fake,
    backward=_backward,
    saves="x weight bias stats",
    carriers="y",
    triton=Kernel(rowwise="x"),
)


def _rows(op: str, name: str, value: Any, per_head: bool) -> Tensor:
    """q or k as [B, N, slots, channels of one norm]."""
    checks.is_float_tensor(op, name, value)
    if value.ndim not in (3, 4) or (per_head and value.ndim == 3):
        checks.fail(op, name, "of shape (B, N, H, D)" + ("" if per_head else " or (B, N, C)"), tuple(value.shape))
    if not per_head:
        value = value.flatten(2).unsqueeze(2)
    if value.shape[-1] < 1:
        checks.fail(op, name, "of one channel or more", tuple(value.shape))
    return unit_stride(value)


def _parameter(op: str, name: str, value: Any, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    checks.is_float_tensor(op, name, value)
    if tuple(value.shape) != (x.shape[3],):
        checks.fail(op, name, f"of shape ({x.shape[3]},)", tuple(value.shape))
    checks.same_device(op, [("q", x), (name, value)])
    return value.contiguous().unsqueeze(0)  # type: ignore[no-any-return]


def _plain(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, q_bias: Tensor | None = None, k_weight: Tensor | None = None,
    k_bias: Tensor | None = None, *, per_head: bool = False, kind: str = "layer", eps: float = 1e-5,
) -> Any:  # fmt: skip
    if kind != "layer" or (q.ndim == 4 and not per_head) or (k.ndim == 4 and not per_head):
        return NotImplemented
    return F.layer_norm(q, q.shape[-1:], q_weight, q_bias, eps), F.layer_norm(k, k.shape[-1:], k_weight, k_bias, eps)


@or_plain(_plain)
def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    per_head: bool = False,
    kind: str = "layer",
    eps: float = 1e-5,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys: ``weight (x - mean) / sqrt(var + eps) + bias`` over C, or over D a head.

    PixArt-Sigma's QK norm (arXiv 2403.04692) is the default, a LayerNorm over all channels; per head with kind "rms" it
    is the one of most later transformers: ``weight x / sqrt(mean x^2 + eps)``. Arithmetic in float32 (float64 for
    float64).

    Args:
        q: ``(B, N, C)`` or ``(B, N, H, D)``; float32, bfloat16, float16 or float64; outer strides free.
        k: ``(B, M, C)`` or ``(B, M, H, D)``; likewise.
        q_weight: ``(C,)``, per head ``(D,)``; None is 1.
        q_bias: the same shape; None is 0.
        k_weight: of k.
        k_bias: of k.
        per_head: normalise each head of ``(B, N, H, D)`` by itself.
        kind: ``"layer"`` or ``"rms"``.
        eps: added to the variance (mean square).
        inplace: write the results over q and k and return these; no gradient then.

    Returns:
        (q, k), normalised. Differentiable, once, in every tensor argument; deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> q = torch.tensor([[[3.0, -3.0]]])
        >>> w2s_fast.qk_norm(q, q, kind="rms", eps=0.0)[0]
        tensor([[[ 1., -1.]]])
    """
    op = "qk_norm"
    checks.choice(op, "kind", kind, ("layer", "rms"))
    eps = checks.number(op, "eps", eps, low=0.0)
    if inplace and torch.is_grad_enabled():
        given = (q, k, q_weight, q_bias, k_weight, k_bias)
        if any(isinstance(t, Tensor) and t.requires_grad for t in given):
            checks.fail(op, "inplace", "False where a gradient is wanted", True, "Use torch.no_grad().")
    found = []
    for name, value, weight, bias in (("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)):
        x = _rows(op, name, value, per_head)
        checks.same_device(op, [("q", q), (name, x)])
        gamma, beta = _parameter(op, f"{name}_weight", weight, x), _parameter(op, f"{name}_bias", bias, x)
        y = QK_NORM(x, 0, x.shape[2], gamma, beta, kind == "rms", eps).y.view(value.shape)
        found.append(value.copy_(y) if inplace else y)
    return found[0], found[1]
