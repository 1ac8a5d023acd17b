"""linear_kd: distillation from hidden states, with the [T, V] logits of student and teachers never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import distillation as reference
from ...reference.linear_loss.arguments import Distillation
from ...transforms import wants_grad
from ..layout import separate_rows
from ..stored import scaled
from .inputs import logit_bytes
from .kd import SAVED, of_coefficients, of_loss_alone, plain_fkl, upstream
from .teachers import (
    Kind,
    Reduction,
    Teacher,
    accumulate_dtype,
    check_cosine,
    check_head,
    coefficients,
    named_outputs,
    settings,
)
from .teachers import teachers as checked


def _backward(call: Call, grads: reference.LinearDistilled) -> dict[str, Any]:
    rows = of_coefficients(call, grads.loss)
    names = [name for name in ("hidden", "head", "bias") if getattr(call.needs, name)]
    if names:
        if of_loss_alone(grads) and all(getattr(call, f"need_{name}") for name in names):
            found = scaled(grads.loss, [getattr(call.out, f"d{name}") for name in names])
        else:
            need = {f"need_{name}": name in names for name in ("hidden", "head", "bias")}
            given, linear = upstream(call, grads), (call.hidden, call.head, call.bias)
            again = LINEAR_KD.on(call.backend)(*linear, given, **need, need_statistics=False)
            found = [getattr(again, f"d{name}") for name in names]
        rows.update(zip(names, found, strict=True))
    return rows


def _fake(
    hidden: Tensor, head: Tensor, bias: Tensor | None, given: Distillation, need_hidden: bool, need_head: bool,
    need_bias: bool, need_statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden, given.teachers)
    shapes: list[tuple[Any, ...]] = [(), (rows,), (rows,), (3, rows) if need_statistics else (0,)]
    return (
        *(hidden.new_empty(shape, dtype=dtype) for shape in shapes),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        head.new_empty(head.shape if need_head else (0,)),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape if need_bias else (0,)),
    )


LINEAR_KD = define(
    reference.linear_kd,
    fake=_fake,
    backward=_backward,
    saves=f"hidden head bias {SAVED} dhidden dhead dbias",
    carriers="loss kd ce",
    triton=Kernel("kd", rowwise="hidden head teachers"),
)


def _plain(
    hidden: Tensor, lm_head: Tensor, teachers: Sequence[Teacher], *, kind: Kind = "fkl", tau: float = 1.0,
    bias: Tensor | None = None, tau_scale: bool = True, reduction: Reduction = "batchmean",
) -> Any:  # fmt: skip
    if kind != "fkl" or reduction != "batchmean" or len(teachers) != 1 or teachers[0][0] not in ("logits", "linear"):
        return NotImplemented
    if teachers[0][0] == "linear":
        with torch.no_grad():
            teacher = F.linear(*teachers[0][1:])
    else:
        teacher = teachers[0][1]
    return plain_fkl(F.linear(hidden, lm_head, bias), teacher, tau, tau_scale)


def _logits(hidden: Tensor, lm_head: Tensor, *_: Any, **options: Any) -> float:
    return logit_bytes(hidden, lm_head)


@or_plain(_plain, _logits)
def linear_kd(
    hidden: Tensor,
    lm_head: Tensor,
    teachers: Sequence[Teacher],
    *,
    kind: Kind = "fkl",
    alpha: float | Tensor | None = None,
    tau: float = 1.0,
    beta_jsd: float = 0.5,
    beta_sce: float = 0.5,
    power_student: float = 1.0,
    power_teacher: float = 1.0,
    target: Tensor | None = None,
    hard: Literal["none", "ce"] = "none",
    weights: Tensor | None = None,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    teacher_weights: Sequence[float] | None = None,
    tau_scale: bool = True,
    reduction: Reduction = "batchmean",
    outputs: Sequence[str] = (),
    vocab: Literal["intersect"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kd_loss` of ``z = W h + b`` from hidden states: logits exist for a chunk of rows at a time.

    Rows that do not count (``target == ignore_index``, weight 0) are left out before the products and cost nothing.

    Args:
        hidden: ``[..., D]`` of the student: float32, bfloat16, float16 or float64.
        lm_head: ``[V, D]`` of the same dtype.
        teachers: as for `kd_loss`, and ``("linear", h, W)`` or ``("linear", h, W, bias)`` with ``[..., D_m]``,
            ``[V, D_m]`` and ``[V]``, whose logits are not held whole either.
        kind, alpha, tau, beta_jsd, beta_sce, power_student, power_teacher: see `kd_loss`.
        target, hard, weights, ignore_index, teacher_weights, tau_scale, outputs, vocab: see `kd_loss`.
        reduction: see `kd_loss`; ``"none"`` is refused, as entries are as large as the logits (``outputs=("kd",)``
            has a number a row).
        bias: ``[V]`` or None.

    Returns:
        (loss, outputs) as `kd_loss`. Differentiable, once, in hidden, lm_head, bias, alpha and weights; no teacher gets
        a gradient. The gradients of hidden, head and bias are made in forward, 6 T D V operations, and teachers add
        2 T D_m V; memory is the gradients and one tile of chunk x V a model. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a label or id out of range.

    Example:
        >>> import torch, w2s_fast
        >>> h, head = torch.ones(1, 2), torch.zeros(4, 2)
        >>> loss, _ = w2s_fast.linear_kd(h, head, [("linear", h, head)], tau=2.0)
        >>> loss.item()
        0.0
    """
    op = "linear_kd"
    if reduction == "none":
        checks.fail(op, "reduction", '"batchmean", "sum" or "mean"', repr(reduction),
                    'Entries are as large as the logits, which are never held whole; outputs=("kd",) has the rows.')
    hidden, lm_head, bias = autocast.linear(hidden, lm_head, bias)
    checks.is_float_tensor(op, "hidden", hidden)
    checks.is_float_tensor(op, "lm_head", lm_head)
    if hidden.ndim < 1:
        checks.fail(op, "hidden", "of shape [..., D]", tuple(hidden.shape))
    check_head(op, ("hidden", "lm_head", "bias"), hidden, lm_head, bias)
    checks.same_device(op, [("hidden", hidden), ("lm_head", lm_head), ("bias", bias)])
    number, tau, beta, power = settings(
        op, kind, tau, beta_jsd, beta_sce, power_student, power_teacher, outputs, hard
    )
    batch = hidden.shape[:-1]
    student = separate_rows(hidden.reshape(batch.numel(), hidden.shape[-1]))
    found = checked(op, student, batch, teachers, lm_head.shape[0], teacher_weights, vocab, linear=True)
    tensors, forms, shares, width = found
    head, offset = separate_rows(lm_head[:width]), None if bias is None else bias[:width].contiguous()
    check_cosine(op, number, forms)
    scale = tau * tau if tau_scale and kind != "cosine" else 1.0
    dtype = accumulate_dtype(student, tensors)
    rows = coefficients(op, student, batch, dtype, width, alpha, target, hard, weights, ignore_index, scale, reduction)
    given = Distillation(tensors, forms, shares, number, tau, beta, power, *rows)
    need = [wants_grad(t) for t in (student, head, offset)]
    statistics = any(name not in ("kd", "ce") for name in outputs)
    made = LINEAR_KD(student, head, offset, given, *need, statistics)
    return made.loss, named_outputs(outputs, batch, made.kd, made.ce, made.stats, scale, weights)
