"""kd_loss: distillation from logits; loss and gradient from one read of each logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import distillation as reference
from ...reference.linear_loss.arguments import Distillation
from ...transforms import wants_grad
from ..layout import separate_rows
from ..numbers import number
from ..stored import scaled
from .teachers import (
    Kind,
    Reduction,
    Teacher,
    accumulate_dtype,
    check_cosine,
    coefficients,
    flat_rows,
    named_outputs,
    settings,
)
from .teachers import teachers as checked

#: What `of_coefficients` and a second forward need.
SAVED = "teachers target keep coef_kd coef_ce kd ce"


def of_coefficients(call: Call, grad: Tensor | None) -> dict[str, Any]:
    """Gradients of the coefficients, from that of the loss."""
    needs = call.needs.given
    if grad is None or not (needs.coef_kd or needs.coef_ce):
        return {}
    return {
        "coef_kd": grad * call.out.kd if needs.coef_kd else None,
        "coef_ce": grad * call.out.ce if needs.coef_ce else None,
    }


def of_loss_alone(grads: Any) -> bool:
    """Whether forward's gradients are the ones wanted, up to that of the loss."""
    return grads.kd is None and grads.ce is None


def upstream(call: Call, grads: Any) -> Distillation:
    """The arguments with the coefficients that all upstream gradients make together."""
    grad = grads.loss
    given: Distillation = call.given
    a, b = _merged(grad, grads.kd, given.coef_kd), _merged(grad, grads.ce, given.coef_ce)
    a = torch.zeros_like(given.coef_kd) if a is None else a.contiguous()
    b = b if b is None or given.target is None else b.contiguous()
    return given._replace(coef_kd=a, coef_ce=b)


def _merged(grad: Tensor | None, rows: Tensor | None, coef: Tensor | None) -> Tensor | None:
    own = None if grad is None or coef is None else grad * coef
    return rows if own is None else own if rows is None else own + rows


def _backward(call: Call, grads: reference.Distilled) -> dict[str, Any]:
    rows = of_coefficients(call, grads.loss)
    if call.needs.logits:
        if call.need_gradient and of_loss_alone(grads):
            rows["logits"] = scaled(grads.loss, [call.out.dlogits])[0]
        else:
            rows["logits"] = KD_LOSS.on(call.backend)(call.logits, upstream(call, grads), True, False).dlogits
    return rows


def _fake(logits: Tensor, given: Distillation, need_gradient: bool, need_statistics: bool) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[0], accumulate_dtype(logits, given.teachers)
    shapes: list[tuple[Any, ...]] = [(), (rows,), (rows,), (3, rows) if need_statistics else (0,)]
    return (
        *(logits.new_empty(shape, dtype=dtype) for shape in shapes),
        logits.new_empty(logits.shape if need_gradient else (0,)),
    )


KD_LOSS = define(
    reference.kd_loss,
    fake=_fake,
    backward=_backward,
    saves=f"logits {SAVED} dlogits",
    carriers="loss kd ce",
    triton=Kernel("kd", rowwise="logits teachers"),
)


def _entries(logits: Tensor, given: Distillation) -> Tensor:
    """coef_kd D of every class ``[T, C]``, 0 in rows that do not count."""
    dtype = accumulate_dtype(logits, given.teachers)
    t = reference.teacher(given.teachers, given.forms, given.shares, given.tau, logits.shape[1], dtype)
    z = logits.to(dtype) if given.keep is None else torch.where(given.keep.unsqueeze(1), logits.to(dtype), 0.0)
    log_p = torch.log_softmax(z / given.tau, -1)
    found = reference.entries(given.kind, given.beta, given.power, log_p, t)
    found = found if given.keep is None else torch.where(given.keep.unsqueeze(1), found, 0.0)
    return found * given.coef_kd.unsqueeze(1)


def _plain(
    logits: Tensor, teachers: Sequence[Teacher], *, kind: Kind = "fkl", tau: float = 1.0, tau_scale: bool = True,
    reduction: Reduction = "batchmean",
) -> Any:  # fmt: skip
    if kind != "fkl" or reduction != "batchmean" or len(teachers) != 1 or teachers[0][0] != "logits":
        return NotImplemented
    return plain_fkl(logits, teachers[0][1], tau, tau_scale)


def plain_fkl(z: Tensor, teacher: Tensor, tau: float, tau_scale: bool) -> Any:
    """The loss as one writes it in PyTorch, and no outputs; NotImplemented where a class is impossible."""
    dtype = accumulate_dtype(z, [teacher])
    if z.shape != teacher.shape:
        return NotImplemented
    z, t = (x if x.ndim == 2 else x.flatten(0, -2) for x in (z, teacher.detach()))
    p, q = ((x if x.dtype is dtype else x.to(dtype)) * number(1 / tau, dtype) for x in (z, t))
    loss = F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="sum")
    if not math.isfinite(loss.item()):
        return NotImplemented
    return loss * number((tau * tau if tau_scale else 1.0) / max(len(p), 1), dtype), {}


@or_plain(_plain)
def kd_loss(
    logits: Tensor,
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
    teacher_weights: Sequence[float] | None = None,
    tau_scale: bool = True,
    reduction: Reduction = "batchmean",
    outputs: Sequence[str] = (),
    vocab: Literal["intersect"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Knowledge distillation from logits: one row kernel reads each logit once and makes loss and gradient together.

    ``L = (1 / N) sum_t w_t [alpha_t tau^2 D_t + (1 - alpha_t) CE_t]``, N the sum of w over the rows that count (the
    loss is 0 if N is), p = softmax(z / tau), q = sum_m omega_m q_m, CE the cross-entropy of softmax(z) with the label.
    D is

    - ``"fkl"``: KL(q || p) (Hinton et al., arXiv 1503.02531);
    - ``"rkl"``: KL(p || q), log q floored at -1e4;
    - ``"jsd"``: ``b KL(q || m) + (1 - b) KL(p || m)``, ``m = b q + (1 - b) p``, b = beta_jsd (GKD, arXiv 2306.13649);
      at b = 0 it is ``"fkl"`` and at b = 1 ``"rkl"``, which D / b and D / (1 - b) tend to (D itself is 0 there);
    - ``"sce"``: ``-(1 - b) sum q log p - b sum p log q``, b = beta_sce (robust mean teacher, arXiv 2211.13081);
    - ``"ce_soft"``: ``-sum q log p`` (MEAL V2, arXiv 2009.08453, with several teachers);
    - ``"product"``: ``-sum t log p`` with ``t = p^a q^b / sum p^a q^b`` held fixed, a = power_student and
      b = power_teacher (the product confidence loss of weak-to-strong generalization, arXiv 2312.09390);
    - ``"cosine"``: ``1 - z . y / (max(|z|, 1e-8) max(|y|, 1e-8))`` of the logits z of student and y of teacher, as
      `torch.nn.functional.cosine_similarity` has it. One teacher of logits; tau is no part of it, nor tau^2.

    Args:
        logits: ``[..., C]`` of the student: float32, bfloat16, float16 or float64; N-dimensional rows are flattened.
        teachers: a list of ``("logits", z)``, ``("probs", q)``, ``("topk", ids, logp)`` with tensors ``[..., C]``, or
            ``[..., K]`` for top-k, K <= 64. tau divides z; q and logp are taken as they are. The mass that a top-k list
            leaves (at least 1e-12) is spread evenly over the other classes, as FKD stores labels. No teacher gets a
            gradient.
        kind: which D.
        alpha: a number or a tensor of the leading shape, with a gradient (TGeo-KD learns it); None is 1, and not
            allowed with ``hard="ce"``.
        tau: temperature, > 0.
        beta_jsd: share of the teacher in the mixture, in [0, 1].
        beta_sce: share of the reverse cross-entropy, in [0, 1].
        power_student: a >= 0; 0 leaves p out of the product.
        power_teacher: b >= 0; 0 leaves q out. A row in which no class is possible for both has D = 0.
        target: labels of the leading shape, int64 or int32; rows that hold ``ignore_index`` do not count.
        hard: ``"ce"`` adds the cross-entropy with ``target``.
        weights: w of the leading shape; rows of weight 0 are left out. With a gradient.
        ignore_index: label of the rows left out.
        teacher_weights: omega, one number >= 0 a teacher, divided by their sum; equal by default.
        tau_scale: whether D is multiplied by tau^2, which keeps its gradient's size.
        reduction: as `torch.nn.functional.kl_div`. ``"batchmean"``: the L above; ``"sum"``: N = 1; ``"mean"``: N is
            also multiplied with the number of classes, the mean over entries; ``"none"``: no sum at all, the entries
            ``w_t alpha_t tau^2 D_tv`` ``[..., C]`` (not of cosine, and without ``hard``), in plain PyTorch.
        outputs: names of further results: ``"kd"`` (D_t, times tau^2 if scaled) and ``"ce"``, both differentiable;
            ``"entropy_s"``, ``"entropy_t"`` (of p and q) and ``"agree"`` (same largest class), which are not.
        vocab: ``"intersect"`` takes the columns that student and teachers of logits all have; otherwise widths that
            differ are an error.

    Returns:
        (loss, outputs): loss a scalar (``[..., C]`` without reduction), outputs of the leading shape, both 0 in rows
        that do not count; float32 (float64
        if the student or a teacher is). Differentiable, once, in logits, alpha and weights. The gradient of the logits
        is made in forward (as many bytes as logits). Deterministic.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a label or id out of range.

    Example:
        >>> import torch, w2s_fast
        >>> z, q = torch.zeros(1, 2), torch.tensor([[0.9, 0.1]])
        >>> loss, rows = w2s_fast.kd_loss(z, [("probs", q)], outputs=("agree",))
        >>> round(loss.item(), 4), rows["agree"].tolist()
        (0.3681, [True])
    """
    op = "kd_loss"
    checks.is_float_tensor(op, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        checks.fail(op, "logits", "of shape [..., C], C >= 1", tuple(logits.shape))
    number, tau, beta, power = settings(
        op, kind, tau, beta_jsd, beta_sce, power_student, power_teacher, outputs, hard
    )
    batch = logits.shape[:-1]
    found = checked(op, logits, batch, teachers, logits.shape[-1], teacher_weights, vocab, linear=False)
    tensors, forms, shares, width = found
    student = separate_rows(flat_rows(logits, batch, width))
    check_cosine(op, number, forms)
    scale = tau * tau if tau_scale and kind != "cosine" else 1.0
    dtype = accumulate_dtype(student, tensors)
    rows = coefficients(op, student, batch, dtype, width, alpha, target, hard, weights, ignore_index, scale, reduction)
    given = Distillation(tensors, forms, shares, number, tau, beta, power, *rows)
    if reduction == "none":
        if hard == "ce" or kind == "cosine" or outputs:
            checks.fail(op, "reduction", 'other than "none" with hard, kind "cosine" or outputs', repr(reduction))
        return _entries(student, given).reshape(*batch, width), {}
    need = wants_grad(student)
    statistics = any(name not in ("kd", "ce") for name in outputs)
    made = KD_LOSS(student, given, need, statistics)
    return made.loss, named_outputs(outputs, batch, made.kd, made.ce, made.stats, scale, weights)
