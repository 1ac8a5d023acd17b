"""The op under linear_ce and linear_fusion_cross_entropy: a target of ids, a uniform and a dense part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import ce as reference
from ...reference.linear_loss.arguments import Coefficients, Linear, Need, Target
from .gradient import LINEAR_LOSS_BACKWARD, by_name, fake_gradients, wanted
from .inputs import keeps_logits, kept_shape, need_of
from .stored import STORED, stored_gradients


def _fake(
    model: Linear, target: Target, weight: Tensor, z_loss: float, scaled: bool, need_entropy: bool, need_best: bool,
    need_kept: bool, need: Need,
) -> tuple[Any, ...]:  # fmt: skip
    first, rows, acc = model.hiddens[0], model.rows, model.accumulate
    sizes = [(), (rows,), (rows,), (rows,), (rows if need_entropy else 0,)]
    return (
        *(first.new_empty(size, dtype=acc) for size in sizes),
        first.new_empty((rows if need_best else 0,), dtype=torch.int64),
        first.new_empty((rows if need_best else 0,), dtype=acc),
        first.new_empty(kept_shape(model) if need_kept else (0,), dtype=acc),
        *fake_gradients(model, need),
    )


def _backward(call: Call, grads: reference.CrossEntropy) -> dict[str, Any]:
    need, made, entropy = wanted(call), call.need, grads.entropy if call.need_entropy else None
    others = (grads.row, grads.logp, grads.lse, entropy)
    if all(g is None for g in others) and all(n & ~m == 0 for n, m in zip(need, made, strict=True)):
        return stored_gradients(call, grads.loss, need)
    coef, kept = _coefficients(call, grads.loss, *others), call.out.kept if call.need_kept else None
    return by_name(LINEAR_LOSS_BACKWARD.on(call.backend)(call.model, coef, need, kept), need, call.model.weights)


def _coefficients(
    call: Call,
    grad: Tensor | None,
    row: Tensor | None,
    logp_grad: Tensor | None,
    lse_grad: Tensor | None,
    entropy_grad: Tensor | None,
) -> Coefficients:
    """The derivative in the logits from the gradients of the results."""
    q, logp, lse, weight = call.target, call.out.logp, call.out.lse, call.weight
    core, mass = q.core(lse.dtype), q.mass(call.model.vocab_size, lse.dtype)

    def rows(g: Tensor | None) -> Tensor:
        return torch.where(q.keep, torch.zeros_like(lse) if g is None else g, 0.0)

    outer = rows(None if grad is None else grad * weight.to(lse.dtype)) + rows(row)
    outer = torch.where(outer == 0, 0.0, outer * logp.exp()) if call.scaled else outer
    picked = torch.where(core == 0, 0.0, rows(logp_grad))
    share = picked / torch.where(core == 0, 1.0, core)
    coef_lse = outer * (mass + 2 * call.z_loss * lse) - picked + rows(lse_grad)
    coef_log = None
    if entropy_grad is not None:  # dH / dz = -p (log p + H)
        coef_log = -rows(entropy_grad)
        coef_lse = coef_lse + coef_log * call.out.entropy
    probs = q.probs.to(lse.dtype)
    weighed = q.class_probs(torch.where(q.ids < 0, 0.0, probs))
    own = share.unsqueeze(1) * probs - outer.unsqueeze(1) * weighed
    coef_all = None if q.uniform is None else -outer * q.uniform.to(lse.dtype)
    dense, coef_dense, classes = q.dense, None if q.dense is None else share - outer, q.classes
    if dense is not None and classes is not None and logp_grad is not None:
        # the classes weigh the loss but not logp: the two parts in one matrix
        weight_v = classes.to(lse.dtype)
        dense = dense.to(lse.dtype) * (share.unsqueeze(1) - outer.unsqueeze(1) * weight_v)
        dense = dense if coef_all is None else dense + coef_all.unsqueeze(1) * weight_v
        coef_all, coef_dense, classes = None, torch.ones_like(lse), None
    return Coefficients(lse, q.ids, own, coef_lse, coef_log, coef_all, dense, coef_dense, classes)


LINEAR_CE = define(
    reference.linear_ce,
    fake=_fake,
    backward=_backward,
    saves=f"{STORED} keep ids probs uniform dense classes weight logp lse entropy kept",
    carriers="loss row logp lse entropy",
    triton=Kernel(rowwise="hiddens heads dense"),
)


def cross_entropy(
    given: Linear,
    q: Target,
    weight: Tensor,
    z_loss: float,
    entropy: bool,
    best: bool,
    gradients: bool,
    scaled: bool = False,
) -> reference.CrossEntropy:
    """The loss and its rows; with ``gradients`` those of the loss are made in that pass."""
    need = need_of(given) if gradients else Need(0, 0, 0, False)
    kept = not gradients and keeps_logits(given, q.keep)
    found: reference.CrossEntropy = LINEAR_CE(given, q, weight, z_loss, scaled, entropy, best, kept, need)
    return found
