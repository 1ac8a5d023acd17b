"""fuse_logits: z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature in one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import NOT_KEPT, Call, Either
from ...library import Kernel, define
from ...reference.logit_fusion import fuse as reference
from ...reference.logit_fusion.arguments import Fusion
from ...values import all_finite
from .gradient import TENSORS, fusion_gradients, input_gradients
from .inputs import accumulate_dtype, fusion, unflatten


def _fake(given: Fusion, out_dtype: torch.dtype, need_lse: bool) -> tuple[Tensor, Tensor]:
    rows = given.base.shape[0]
    fused = given.base.new_empty((rows, given.vocab_size), dtype=out_dtype)
    return fused, given.base.new_empty((rows,) if need_lse else (0,), dtype=accumulate_dtype(given))


def _saves(call: Call) -> str | Either:
    """Nothing, where every tensor's gradient is a multiple of that of z: no weights to learn, one shape and dtype, and
    no token of z = -inf, which on a CPU a look at z tells."""
    given, fused = call.given, call.out.fused
    settled = given.weights is None and given.temperature is None and not given.plausible and not call.need_lse
    if settled and type(fused) is Tensor and checks.readable(fused) and fused.numel():
        like = [t.shape == fused.shape and t.dtype == fused.dtype for t in (given.base, *given.experts, *given.anti)]
        if all(like):
            return Either("fused", "", f"{TENSORS} lse")
    return f"{TENSORS} lse"


def _backward(call: Call, grads: reference.FusedLogits) -> dict[str, Any]:
    if call.need_lse:
        return fusion_gradients(call, call.out.lse, grads.fused, grads.lse)
    if grads.fused is None:
        return {}
    if call.given.base is NOT_KEPT:
        heat = call.given.temperature_value
        return input_gradients(call, grads.fused if heat == 1 else grads.fused / heat)
    unused = call.out.lse.new_empty(call.given.base.shape[0])  # its softmax gets no coefficient
    return fusion_gradients(call, unused, grads.fused)


FUSE_LOGITS = define(
    reference.fuse_logits,
    fake=_fake,
    backward=_backward,
    saves=_saves,
    triton=Kernel(rowwise="base experts anti", strided="weights temperature"),
)

Weights = float | Sequence[float] | Tensor
Plausible = tuple[Literal["min_p", "top_p"], float]


def plain_fused(base: Tensor, experts: Any, anti: Any, weights: Any) -> Any:
    """The fused logits as one writes them in PyTorch, in float32; NotImplemented where a token is impossible."""
    if type(weights) is not float or not isinstance(experts, (list, tuple)):
        return NotImplemented
    anti, shape, kind = (anti,) if isinstance(anti, Tensor) else anti, base.shape, base.dtype
    if len(anti) not in (1, len(experts)):
        return NotImplemented
    z = base if kind is torch.float32 or kind is torch.float64 else base.float()
    for k, expert in enumerate(experts):
        against, dtype = anti[k if len(anti) > 1 else 0], expert.dtype
        if expert.shape != shape or against.shape != shape or dtype is not against.dtype:
            return NotImplemented
        if dtype is not kind and (dtype is torch.float64 or kind is torch.float64):
            return NotImplemented
        if dtype is not torch.float32 and dtype is not torch.float64:
            expert, against = expert.float(), against.float()
        z = z + (expert - against) if weights == 1.0 else torch.add(z, expert - against, alpha=weights)
    return z if all_finite(z) else NotImplemented


def _plain(base: Tensor, experts: Any, anti: Any, weights: Any = 1.0) -> Any:
    z = plain_fused(base, experts, anti, weights)
    return z if z is NotImplemented or z.dtype is base.dtype else z.to(base.dtype)


@overload
def fuse_logits(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor] | None = ...,
    weights: Weights = ...,
    *,
    base_weight: float = ...,
    temperature: float | Tensor = ...,
    plausible: Plausible | None = ...,
    vocab_size: int | None = ...,
    out_dtype: torch.dtype | None = ...,
    return_lse: Literal[False] = ...,
    strict_vocab: bool = ...,
) -> Tensor: ...
@overload
def fuse_logits(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor] | None = ...,
    weights: Weights = ...,
    *,
    base_weight: float = ...,
    temperature: float | Tensor = ...,
    plausible: Plausible | None = ...,
    vocab_size: int | None = ...,
    out_dtype: torch.dtype | None = ...,
    return_lse: Literal[True],
    strict_vocab: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@or_plain(_plain, replayed=True)
def fuse_logits(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor] | None = None,
    weights: Weights = 1.0,
    *,
    base_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    plausible: Plausible | None = None,
    vocab_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    strict_vocab: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Combine the logits of a large model with those of small experts, in one read of each.

    ``z = (base_weight * base + sum_k w_k (experts_k - anti_k)) / temperature``. Proxy-tuning (arXiv 2401.08565),
    DExperts (2105.03023), contrastive decoding (2210.15097), DeRa (2402.02992), MOD (2406.18853) and GenARM
    (2410.08193) are this sum with different weights.

    Args:
        base: ``[..., V]`` logits of the large model; float32, bfloat16, float16 or float64. The last dimension
            should be contiguous (otherwise it is copied); leading strides are free, so ``logits[:, -1, :]`` is
            read in place.
        experts: K tensors ``[..., V_k]`` or one ``[K, ..., V]``; dtypes may differ, leading shapes broadcast.
        anti: the untuned small model's logits, one shared or one an expert; absent means 0.
        weights: a number, K numbers, or a tensor ``[K]`` or ``[..., K]``.
        base_weight: weight of ``base``.
        temperature: a number > 0 or a tensor of the leading shape (its values are not checked).
        plausible: ``("min_p", x)`` keeps tokens with P_base >= x max P_base, ``("top_p", x)`` the base's nucleus;
            the others get -inf. Decided on ``base`` before fusing.
        vocab_size: columns that take part; default the smallest width. Others are never read.
        out_dtype: dtype of the result; default that of ``base``.
        return_lse: also return the row-wise log-sum-exp of ``z``.
        strict_vocab: refuse differing widths unless ``vocab_size`` is given.

    Returns:
        ``z`` of shape ``[..., vocab_size]``; with ``return_lse`` also lse ``[...]`` in float32 (float64 for
        float64 inputs). Differentiable in every tensor argument, once.

    Arithmetic is float32 (float64 if any logits are). -inf in ``base`` stays -inf, NaN stays NaN. Deterministic.

    Raises:
        ValueError: shapes, widths or values that do not fit; TypeError: dtypes; the message names the argument.

    Example:
        >>> import torch, w2s_fast
        >>> base, expert, anti = torch.tensor([[1., 2.]]), torch.tensor([[3., 0.]]), torch.tensor([[1., 1.]])
        >>> w2s_fast.fuse_logits(base, [expert], anti, weights=0.5)
        tensor([[2.0000, 1.5000]])
    """
    given, batch = fusion(
        "fuse_logits", base, experts, anti, weights, base_weight, temperature, plausible, vocab_size, strict_vocab
    )
    dtype = checks.float_dtype("fuse_logits", "out_dtype", base.dtype if out_dtype is None else out_dtype)
    fused, lse = FUSE_LOGITS(given, dtype, bool(return_lse))
    fused = unflatten(fused, batch)
    return (fused, unflatten(lse, batch)) if return_lse else fused
