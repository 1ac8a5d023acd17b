"""linear_kd: distillation from hidden states, with the [T, V] logits of student and teachers never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ... import autocast, checks
from ...library import Kernel, define
from ...reference.linear_loss import distillation as reference
from ...transforms import wants_grad
from .inputs import _unit_stride as unit_stride
from .kd import save_distillation, saved_distillation
from .stored import scaled
from .teachers import (
    DISTILLATION,
    Distillation,
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_distillation(ctx, Distillation(*inputs[3:14]), output[1], output[2], inputs[:3], output[4:])
    ctx.need = inputs[14:17]  # the gradients that forward made
    ctx.mark_non_differentiable(*output[3:])


def _backward(
    ctx: Any, grad: Tensor | None, grad_kd: Tensor | None, grad_ce: Tensor | None, *_: Any
) -> dict[str, Any]:
    grads, student, given, rows, made = saved_distillation(ctx, grad, grad_kd, grad_ce)
    need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    if any(need):
        made = made and all(done or not want for done, want in zip(ctx.need, need, strict=True))
        found = scaled(grad, grads) if made else LINEAR_KD.on(ctx.backend)(*student, *given(), *need, False)[4:]
        names = ("hidden", "head", "bias")
        rows.update((name, g) for name, g, wanted in zip(names, found, need, strict=True) if wanted)
    return rows


def _fake(hidden: Tensor, head: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    given, (need_hidden, need_head, need_bias, statistics) = Distillation(*args[:11]), args[11:]
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden, given.teachers)
    shapes: list[tuple[Any, ...]] = [(), (rows,), (rows,), (3, rows) if statistics else (0,)]
    return (
        *(hidden.new_empty(shape, dtype=dtype) for shape in shapes),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        head.new_empty(head.shape if need_head else (0,)),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape if need_bias else (0,)),
    )


LINEAR_KD = define(
    "linear_kd",
    f"(Tensor hidden, Tensor head, Tensor? bias, {DISTILLATION}, bool need_hidden, bool need_head, bool need_bias, "
    "bool need_statistics) -> "
    "(Tensor loss, Tensor kd, Tensor ce, Tensor stats, Tensor dhidden, Tensor dhead, Tensor dbias)",
    reference=reference.linear_kd,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=Kernel(
        "kernels.linear_loss.kd:launch_linear_kd",
        "kernels.linear_loss.kd:supports_linear_kd",
        rowwise="hidden head teachers",
    ),
)


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
        kind, alpha, tau, beta_jsd, beta_sce, power_student, power_teacher, target, hard, weights, ignore_index,
            teacher_weights, tau_scale, outputs, vocab: see `kd_loss`.
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
    student = unit_stride(hidden.reshape(batch.numel(), hidden.shape[-1]))
    found = checked(op, student, batch, teachers, lm_head.shape[0], teacher_weights, vocab, linear=True)
    tensors, forms, shares, width = found
    head, offset = unit_stride(lm_head[:width]), None if bias is None else bias[:width].contiguous()
    check_cosine(op, number, forms)
    scale = tau * tau if tau_scale and kind != "cosine" else 1.0
    dtype = accumulate_dtype(student, tensors)
    rows = coefficients(op, student, batch, dtype, width, alpha, target, hard, weights, ignore_index, scale, reduction)
    given = Distillation(tensors, forms, shares, number, tau, beta, power, *rows)
    need = [wants_grad(t) for t in (student, head, offset)]
    statistics = any(name not in ("kd", "ce") for name in outputs)
    loss, kd, ce, stats, *_ = LINEAR_KD(student, head, offset, *given, *need, statistics)
    return loss, named_outputs(outputs, batch, kd, ce, stats, scale, weights)
