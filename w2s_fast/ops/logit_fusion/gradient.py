"""The one gradient of fuse_logits, fused_log_softmax and fused_stats.

All three are functions of z = s / temperature, s = base_weight base + sum_k w_k (experts_k - anti_k), and every
gradient with respect to z that they need has the form

    g_v = grad_v + P_v (a + b z_v - [subtract] sum_u grad_u) + sum_j c_j [v = index_j],    P = softmax(z),

so one kernel forms dz = g / temperature and the reductions for weights and temperature in one sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import Kernel, define
from ...reference.logit_fusion import backward as reference
from .inputs import FUSE, Fusion, accumulate_dtype


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, need = Fusion(*args[:11]), args[-1]
    rows, count = given.base.shape[0], len(given.experts)
    acc = accumulate_dtype(args)
    return (
        given.base.new_empty((rows, given.vocab_size)),
        given.base.new_empty((rows, count) if need else (0,), dtype=acc),
        given.base.new_empty((rows,) if need else (0,), dtype=acc),
    )


FUSE_BACKWARD = define(
    "fuse_backward",
    f"({FUSE}, Tensor? grad, Tensor lse, Tensor? row_a, Tensor? row_b, Tensor? index, Tensor? index_coef, "
    "bool subtract_row_sum, bool need_params) -> (Tensor dz, Tensor dweights, Tensor dtemperature)",
    reference=reference.fuse_backward,
    fake=_fake,
    triton=Kernel(
        "kernels.logit_fusion.fuse_backward:launch_fuse_backward",
        "kernels.logit_fusion.fuse_backward:supports_fuse_backward",
        rowwise="base experts anti",
        strided="weights temperature grad lse row_a row_b index index_coef",
    ),
)


def save_fusion(ctx: Any, inputs: tuple[Any, ...], *extra: Tensor) -> None:
    """Keep what `fusion_gradients` needs: the inputs (no copies) and ``extra`` row vectors."""
    given = Fusion(*inputs[:11])
    ctx.counts = (len(given.experts), len(given.anti))
    ctx.numbers = (
        given.weight_values,
        given.base_weight,
        given.temperature_value,
        given.plausible,
        given.plausible_value,
        given.vocab_size,
    )
    ctx.save_for_backward(given.base, *given.experts, *given.anti, given.weights, given.temperature, *extra)


def saved_fusion(ctx: Any) -> tuple[Fusion, tuple[Tensor, ...]]:
    """What `save_fusion` kept: the fusion and the extra vectors."""
    base, *rest = ctx.saved_tensors
    experts, anti = ctx.counts
    values, base_weight, heat, kind, level, width = ctx.numbers
    weights, temperature, *extra = rest[experts + anti :]
    given = Fusion(
        base,
        rest[:experts],
        rest[experts : experts + anti],
        weights,
        values,
        base_weight,
        temperature,
        heat,
        kind,
        level,
        width,
    )
    return given, tuple(extra)


def fusion_gradients(
    ctx: Any,
    given: Fusion,
    lse: Tensor,
    grad: Tensor | None = None,
    row_a: Tensor | None = None,
    row_b: Tensor | None = None,
    index: Tensor | None = None,
    index_coef: Tensor | None = None,
    subtract_row_sum: bool = False,
) -> dict[str, Any]:
    """Gradients by name of every tensor of ``given``; ctx.needs_input_grad says which are wanted."""
    need_base, need_experts, need_anti, need_weights = ctx.needs_input_grad[:4]
    need_heat = ctx.needs_input_grad[6]
    # dz comes in base's dtype: widen base for that pass where a wider input wants its gradient
    wide = given.base.dtype
    for tensor, need in zip([*given.experts, *given.anti], [*need_experts, *need_anti], strict=True):
        wide = torch.promote_types(wide, tensor.dtype) if need else wide
    widened = given if wide == given.base.dtype else given._replace(base=given.base[:, : given.vocab_size].to(wide))
    dz, dweights, dheat = FUSE_BACKWARD.on(ctx.backend)(
        *widened, grad, lse, row_a, row_b, index, index_coef, subtract_row_sum, bool(need_weights or need_heat)
    )
    count = len(given.experts)
    scales: list[Any] = given.weight_values if given.weights is None else list(given.weights.unbind(1))
    found: dict[str, Any] = {"base": _input_gradient(given.base, dz, given.base_weight) if need_base else None}
    found["experts"] = [
        _input_gradient(t, dz, scales[k]) if need_experts[k] else None for k, t in enumerate(given.experts)
    ]
    shared = len(given.anti) == 1 and count > 1
    found["anti"] = [
        _input_gradient(t, dz, sum(scales) if shared else scales[k], sign=-1.0) if need_anti[k] else None
        for k, t in enumerate(given.anti)
    ]
    found["weights"] = dweights.to(given.weights.dtype) if given.weights is not None and need_weights else None
    found["temperature"] = dheat.to(given.temperature.dtype) if given.temperature is not None and need_heat else None
    return found


def _input_gradient(like: Tensor, dz: Tensor, scale: float | Tensor, sign: float = 1.0) -> Tensor:
    """sign scale dz in the dtype and full width of ``like``; columns past the vocabulary get zero."""
    factor: Any = scale.unsqueeze(1) * sign if isinstance(scale, Tensor) else scale * sign
    unit = not isinstance(scale, Tensor) and factor == 1.0
    result = dz if unit else dz * factor
    if like.shape[1] != dz.shape[1]:
        result = torch.nn.functional.pad(result, (0, like.shape[1] - dz.shape[1]))
    return result.to(like.dtype)
