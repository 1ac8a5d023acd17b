"""gated_mixed_ce: the cross-entropy of two experts mixed by a gate a row, with its gradients in one read."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.mixture import gated_mixed_ce as reference
from ...reference.numerics import accumulate_dtype
from ...transforms import wants_grad
from ...values import all_inside
from ..stored import scaled

Mix = Literal["losses", "logits"]
Reduction = Literal["mean", "sum"]
NAME = "gated_mixed_ce"


def _fake(
    a: Tensor, b: Tensor, target: Tensor, gate: Tensor, factor: Tensor, ignore_index: int, logits: bool, need_a: bool,
    need_b: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc = accumulate_dtype(a, b, gate)
    da, db = a.new_empty(a.shape if need_a else 0), b.new_empty(b.shape if need_b else 0)
    return a.new_empty((), dtype=acc), da, db, a.new_empty(a.shape[0], dtype=acc)


def _backward(call: Call, grads: reference.Mixed) -> dict[str, Any]:
    names = [name for name in ("a", "b", "gate") if getattr(call.needs, name)]
    need_a, need_b, made = "a" in names, "b" in names, call.out
    if (need_a and not call.need_a) or (need_b and not call.need_b):
        arguments = (call.a, call.b, call.target, call.gate, call.factor, call.ignore_index, call.logits)
        made = GATED_MIXED_CE.on(call.backend)(*arguments, need_a, need_b)
    found = dict(zip(names, scaled(grads.loss, [getattr(made, f"d{name}") for name in names]), strict=True))
    if "gate" in found:
        found["gate"] = found["gate"].to(call.gate.dtype)
    return found


GATED_MIXED_CE = define(
    reference.gated_mixed_ce,
    fake=_fake,
    backward=_backward,
    saves="a b target gate factor da db dgate",
    carriers="loss",
    triton=Kernel(rowwise="a b"),
)


def _plain(
    a: Tensor, b: Tensor, target: Tensor, gate: Tensor, *, mix: Mix = "losses", reduction: Reduction = "mean"
) -> Any:
    if not a.dtype == b.dtype == gate.dtype == torch.float32 or not all_inside(target, a.shape[1]):
        return NotImplemented
    if mix == "logits":
        g = gate.unsqueeze(1)
        return F.cross_entropy(g * a + (1 - g) * b, target, reduction=reduction)
    first, second = (F.cross_entropy(z, target, reduction="none") for z in (a, b))
    rows = gate * first + (1 - gate) * second
    return rows.mean() if reduction == "mean" else rows.sum()


@or_plain(_plain)
def gated_mixed_ce(
    a: Tensor, b: Tensor, target: Tensor, gate: Tensor, *, mix: Mix = "losses", ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy of two classifiers mixed row by row, as Mowst trains its experts (arXiv 2311.05185).

    With g the gate of a row: ``"losses"`` is ``g CE(a, y) + (1 - g) CE(b, y)``, ``"logits"`` (Mowst*)
    ``CE(g a + (1 - g) b, y)``. Loss and gradients, ``g (softmax(a) - 1_y)`` and ``(1 - g) (softmax(b) - 1_y)`` (of the
    mixture's softmax for "logits"), are made in one call, which reads the logits once; an expert that wants no gradient
    costs none. Nodes outside a training set are left out by their target, so that no rows are copied. Memory is the
    gradients.

    Args:
        a, b: ``[n, C]``, C >= 1; float32, bfloat16, float16 or float64.
        target: int64 ``[n]`` in ``[0, C)``, or ``ignore_index``.
        gate: ``[n]``, the share of a, in any of these dtypes.
        mix: what is mixed.
        ignore_index: the target of rows that count nowhere, whatever their logits.
        reduction: ``"mean"`` over the rows that are not ignored (0 if there are none), or ``"sum"``.

    Returns:
        A scalar, float32 (float64 if an input is). Differentiable, once, in a, b and gate.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> a, b = torch.zeros(1, 2), torch.tensor([[0.0, 50.0]])
        >>> w2s_fast.gated_mixed_ce(a, b, torch.tensor([1]), torch.tensor([0.5]))
        tensor(0.3466)
    """
    checks.choice(NAME, "mix", mix, ("losses", "logits"))
    checks.choice(NAME, "reduction", reduction, ("mean", "sum"))
    _check_logits(a, b)
    _check_rows(a, target, gate, ignore_index)
    factor = torch.ones((), dtype=accumulate_dtype(a, b, gate), device=a.device)
    if reduction == "mean":
        factor = factor / (target != ignore_index).sum().clamp_min(1)
    # gradients of a mean over many rows are below what float16 holds, unless a loss scale comes first
    late = torch.float16 in (a.dtype, b.dtype)
    need_a, need_b = wants_grad(a), wants_grad(b)
    loss: Tensor = GATED_MIXED_CE(
        a, b, target, gate, torch.ones_like(factor) if late else factor, ignore_index, mix == "logits", need_a, need_b
    ).loss
    return loss * factor if late else loss


def _check_logits(a: Any, b: Any) -> None:
    checks.is_float_tensor(NAME, "a", a)
    checks.is_float_tensor(NAME, "b", b)
    if a.ndim != 2 or a.shape[1] < 1:
        checks.fail(NAME, "a", "of shape (n, C) with at least one class", tuple(a.shape))
    if b.shape != a.shape:
        checks.fail(NAME, "b", f"of the shape of a, {tuple(a.shape)}", tuple(b.shape))
    checks.same_device(NAME, [("a", a), ("b", b)])


def _check_rows(a: Tensor, target: Any, gate: Any, ignore_index: Any) -> None:
    checks.is_float_tensor(NAME, "gate", gate)
    checks.is_tensor(NAME, "target", target)
    checks.int64(NAME, "ignore_index", ignore_index)
    for name, value in (("target", target), ("gate", gate)):
        if value.shape != a.shape[:1]:
            checks.fail(NAME, name, f"of shape ({a.shape[0]},)", tuple(value.shape))
    checks.same_device(NAME, [("a", a), ("target", target), ("gate", gate)])
    if target.dtype != torch.int64:
        checks.fail(NAME, "target", "int64", target.dtype, error=TypeError)
    if checks.readable(target) and target.numel() and not checks.inside(target, a.shape[1]):
        bad = ((target < 0) | (target >= a.shape[1])) & (target != ignore_index)
        if bool(bad.any()):
            checks.fail(NAME, "target", f"in [0, {a.shape[1]}) or ignore_index ({ignore_index})", int(target[bad][0]))
