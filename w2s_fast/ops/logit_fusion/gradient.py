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

from ...gradients import NOT_KEPT, Call
from ...library import Kernel, define
from ...reference.logit_fusion import backward as reference
from ...reference.logit_fusion.arguments import Fusion
from .inputs import accumulate_dtype

#: What `fusion_gradients` needs of a `Fusion`.
TENSORS = "base experts anti weights temperature"


def _fake(given: Fusion, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = given.base.shape[0], len(given.experts)
    acc, (*_, need_params) = accumulate_dtype(given), others
    return (
        given.base.new_empty((rows, given.vocab_size)),
        given.base.new_empty((rows, count) if need_params else (0,), dtype=acc),
        given.base.new_empty((rows,) if need_params else (0,), dtype=acc),
    )


FUSE_BACKWARD = define(
    reference.fuse_backward,
    fake=_fake,
    triton=Kernel(
        "fuse_backward",
        rowwise="base experts anti",
        strided="weights temperature grad lse row_a row_b index index_coef",
    ),
)


def fusion_gradients(
    call: Call,
    lse: Tensor,
    grad: Tensor | None = None,
    row_a: Tensor | None = None,
    row_b: Tensor | None = None,
    index: Tensor | None = None,
    index_coef: Tensor | None = None,
    subtract_row_sum: bool = False,
) -> dict[str, Any]:
    """Gradients by name of the tensors of the call's `Fusion` that want one."""
    given, need = call.given, call.needs.given
    # dz comes in base's dtype: widen base for that pass where a wider input wants its gradient
    wide = given.base.dtype
    for tensor, wanted in zip([*given.experts, *given.anti], [*need.experts, *need.anti], strict=True):
        wide = torch.promote_types(wide, tensor.dtype) if wanted else wide
    widened = given if wide == given.base.dtype else given._replace(base=given.base[:, : given.vocab_size].to(wide))
    dz, dweights, dheat = FUSE_BACKWARD.on(call.backend)(
        widened, grad, lse, row_a, row_b, index, index_coef, subtract_row_sum, bool(need.weights or need.temperature)
    )
    found = input_gradients(call, dz)
    for name, d, like, wanted in (
        ("weights", dweights, given.weights, need.weights),
        ("temperature", dheat, given.temperature, need.temperature),
    ):
        found[name] = d.to(like.dtype) if wanted and like is not None else None
    return found


def input_gradients(call: Call, dz: Tensor) -> dict[str, Any]:
    """Gradients of the models' logits that want one, from dz, that of z before the temperature."""
    given, need = call.given, call.needs.given
    count = len(given.experts)
    scales: list[Any] = given.weight_values if given.weights is None else list(given.weights.unbind(1))
    found: dict[str, Any] = {"base": _input_gradient(given.base, dz, given.base_weight) if need.base else None}
    found["experts"] = [
        _input_gradient(t, dz, scales[k]) if need.experts[k] else None for k, t in enumerate(given.experts)
    ]
    shared = len(given.anti) == 1 and count > 1
    found["anti"] = [
        _input_gradient(t, dz, sum(scales) if shared else scales[k], sign=-1.0) if need.anti[k] else None
        for k, t in enumerate(given.anti)
    ]
    return found


def _input_gradient(like: Any, dz: Tensor, scale: float | Tensor, sign: float = 1.0) -> Tensor:
    """sign scale dz in the dtype and full width of ``like``; columns past the vocabulary get zero. What was not kept is
    like dz."""
    if isinstance(scale, Tensor):
        result = dz * (scale.unsqueeze(1) * sign)
    else:
        factor = scale * sign
        result = dz if factor == 1.0 else -dz if factor == -1.0 else dz * factor
    if like is NOT_KEPT:
        return result
    if like.shape[1] != dz.shape[1]:
        result = torch.nn.functional.pad(result, (0, like.shape[1] - dz.shape[1]))
    return result.to(like.dtype)
