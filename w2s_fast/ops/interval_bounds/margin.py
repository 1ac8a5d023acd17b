"""margin_logits and margin_cross_entropy: worst-case margins of the last layer and their loss, without [B, C, d]."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import margin as reference
from .inputs import FORMS, ROUNDINGS, Form, Rounding, alike, box, layer, rows
from .linear import fake_layer_gradients


class MarginLoss(NamedTuple):
    """Loss, and which samples are verified: every worst-case margin is below 0."""

    loss: Tensor
    verified: Tensor


def _kind(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _gradients(call: Call, grad: Tensor) -> dict[str, Any]:
    needs = call.needs
    made = MARGIN_LOGITS_BACKWARD.on(call.backend)(
        grad.to(_kind(call.a)).contiguous(), call.a, call.b, call.weight, call.y, call.bounds, needs.a or needs.b,
        needs.weight, needs.bias,
    )  # fmt: skip
    return {name: getattr(made, f"d{name}") for name in ("a", "b", "weight", "bias") if getattr(needs, name)}


def _backward_loss(call: Call, grads: reference.Margins) -> dict[str, Any]:
    return _gradients(call, (call.out.z - call.out.loss.unsqueeze(1)).exp() * grads.loss.unsqueeze(1))


def _fake_backward(
    grad: Tensor, a: Tensor, b: Tensor, weight: Tensor, y: Tensor, bounds: bool, *need: bool
) -> tuple[Tensor, ...]:
    return fake_layer_gradients(a, weight, *need)


MARGIN_LOGITS = define(
    reference.margin_logits,
    fake=lambda a, b, weight, *_: a.new_empty((a.shape[0], weight.shape[0]), dtype=_kind(a)),
    backward=_gradients,
    saves="a b weight y",
    triton=Kernel(),
)

MARGIN_CROSS_ENTROPY = define(
    reference.margin_cross_entropy,
    fake=lambda a, b, weight, *_: (
        a.new_empty((a.shape[0],), dtype=_kind(a)),
        a.new_empty((a.shape[0],), dtype=_kind(a)),
        a.new_empty((a.shape[0], weight.shape[0]), dtype=_kind(a)),
    ),
    backward=_backward_loss,
    saves="a b weight y loss z",
    carriers="loss",
    triton=Kernel(),
)

MARGIN_LOGITS_BACKWARD = define(
    reference.margin_logits_backward,
    fake=_fake_backward,
    triton=Kernel(),
)


def _checked(
    op: str, a: Any, b: Any, weight: Any, bias: Any, y: Any, form: Any, rounding: Any, spread: Any
) -> tuple[tuple[Any, ...], torch.Size]:
    """Arguments of the ops, and the leading shape."""
    box(op, a, b)
    if a.ndim < 1:
        checks.fail(op, "a", "at least one-dimensional", tuple(a.shape))
    layer(op, weight, bias, a.shape[-1])
    if weight.shape[0] < 1:
        checks.fail(op, "weight", "at least one row long", tuple(weight.shape))
    a, b, weight, bias = alike(op, ("a", a), ("b", b), ("weight", weight), ("bias", bias))
    checks.is_tensor(op, "y", y)
    if y.dtype not in (torch.int64, torch.int32):
        checks.fail(op, "y", "int64 or int32", y.dtype, error=TypeError)
    if y.shape != a.shape[:-1]:
        checks.fail(op, "y", f"of shape {tuple(a.shape[:-1])}", tuple(y.shape))
    checks.same_device(op, [("a", a), ("y", y)])
    checks.index_range(op, "y", y, weight.shape[0])
    bounds = checks.choice(op, "form", form, FORMS) == "lu"
    sound = checks.choice(op, "rounding", rounding, ROUNDINGS) == "sound"
    spread = checks.number(op, "spread", spread, low=0.0, high=1.0)
    label = y.reshape(-1).to(torch.int64).contiguous()
    return (rows(a), rows(b), rows(weight), bias, label, bounds, sound, spread), a.shape[:-1]


def margin_logits(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    form: Form = "lu",
    rounding: Rounding = "fast",
    spread: float = 0.0,
) -> Tensor:
    """Worst-case margins of a last layer over a box: the specification layer without its ``[B, C, d]`` matrix.

    ``z_k = max over the box of f_k - f_y = (W_k - W_y) m + |W_k - W_y| r + bias_k - bias_y``, 0 at k = y. Cross-entropy
    of z with label y is the robust loss of interval bound propagation (arXiv 1810.12715); z < 0 for all k != y verifies
    the sample.

    Args:
        a, b: lower and upper bounds ``[..., d]`` at the layer's input, or centre and radius with ``form="cr"``;
            float32, bfloat16, float16 or float64.
        weight, bias: ``[C, d]`` and ``[C]`` (or None) of the same dtype.
        y: labels of the leading shape, int64 or int32.
        form: what a and b are: ``"lu"`` or ``"cr"``.
        rounding: ``"fast"``, or ``"sound"``: z is at least the exact maximum, whatever rounding did (see
            `interval_linear`); overflow and NaN give infinity.
        spread: with "sound", what z bounds besides: ``spread (|W| |x| + |bias|)`` of each of the two logits, by which
            another evaluation of them may be off (`nn.bound` with ``rounding="deployed"``); where its partial sums
            could overflow, infinity. At most 1.

    Returns:
        ``[..., C]``, float32 (float64 for float64 inputs). Differentiable, once, in a, b, weight and bias; where
        two classes share a weight the gradient is that of the centre, as PyTorch's |.| has it. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a label out of range.

    Example:
        >>> import torch, w2s_fast
        >>> l, u = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
        >>> w2s_fast.margin_logits(l, u, torch.eye(2), None, torch.tensor([1]))
        tensor([[0., 0.]])
    """
    args, shape = _checked("margin_logits", a, b, weight, bias, y, form, rounding, spread)
    z: Tensor = MARGIN_LOGITS(*args)
    return z if a.ndim == 2 else z.reshape(*shape, weight.shape[0])


def margin_cross_entropy(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    form: Form = "lu",
    rounding: Rounding = "fast",
    spread: float = 0.0,
) -> MarginLoss:
    """Robust cross-entropy of a last layer over a box, and which samples are verified, in one pass.

    ``loss_i = log sum_k exp z_ik`` of the worst-case margins z of `margin_logits` (arXiv 1810.12715); verified means
    ``z_ik < 0`` for every k other than the label.

    Args:
        a, b, weight, bias, y, form, rounding, spread: see `margin_logits`. A claim of robustness needs
            ``rounding="sound"``.
        reduction: ``"mean"`` over the samples (NaN if there are none), ``"sum"`` or ``"none"``.

    Returns:
        (loss, verified): float32 (float64 for float64 inputs), and bool of the leading shape. The loss is
        differentiable, once, in a, b, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a label out of range.

    Example:
        >>> import torch, w2s_fast
        >>> l, u = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]])
        >>> w2s_fast.margin_cross_entropy(l, u, torch.eye(2), None, torch.tensor([1])).verified
        tensor([True])
    """
    op = "margin_cross_entropy"
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    args, shape = _checked(op, a, b, weight, bias, y, form, rounding, spread)
    loss, worst, _ = MARGIN_CROSS_ENTROPY(*args)
    verified = (worst < 0).reshape(shape)
    if reduction == "none":
        return MarginLoss(loss.reshape(shape), verified)
    return MarginLoss(loss.mean() if reduction == "mean" else loss.sum(), verified)
