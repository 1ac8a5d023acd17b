"""contrastive_loss: clip, infonce, siglip and supcon with the [M, N] scores never held whole."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.contrastive import contrastive_loss as reference
from ...reference.contrastive.contrastive_loss import KINDS
from ...reference.numerics import accumulate_dtype
from ...transforms import wants_grad
from ..layout import separate_rows
from ..stored import scaled

Kind = Literal["clip", "infonce", "siglip", "supcon"]
Reduction = Literal["mean", "valid_mean"]
NAME = "contrastive_loss"
_TRAINED = ("x", "y", "scale", "bias")


def _fake(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, labels: Tensor | None,
    column_labels: Tensor | None, kind: str, first: int, need_x: bool, need_y: bool, need_scale: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc = accumulate_dtype(x) if y is None else accumulate_dtype(x, y)
    second = x if y is None else y
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(x.shape[0] if kind == "supcon" else 0, dtype=torch.int64),
        x.new_empty(x.shape if need_x else 0),
        second.new_empty(second.shape if need_y and y is not None else 0),
        x.new_empty(() if need_scale else 0, dtype=acc),
        x.new_empty(() if need_scale else 0, dtype=acc),
    )


def _backward(call: Call, grads: reference.Contrastive) -> dict[str, Any]:
    names = [name for name in _TRAINED if getattr(call.needs, name)]
    need = {"need_x": "x" in names, "need_y": "y" in names, "need_scale": "scale" in names or "bias" in names}
    made = call.out
    if any(wanted and not getattr(call, name) for name, wanted in need.items()):
        arguments = (getattr(call, name) for name in (*_TRAINED, "labels", "column_labels", "kind", "first"))
        made = CONTRASTIVE_LOSS.on(call.backend)(*arguments, **need)
    found = dict(zip(names, scaled(grads.loss, [getattr(made, f"d{name}") for name in names]), strict=True))
    for name in ("scale", "bias"):
        if name in found:
            found[name] = found[name].to(getattr(call, name).dtype)
    return found


CONTRASTIVE_LOSS = define(
    reference.contrastive_loss,
    fake=_fake,
    backward=_backward,
    saves="x y scale bias labels column_labels dx dy dscale dbias",
    carriers="loss",
    triton=Kernel(rowwise="x y"),
)


def contrastive_loss(
    x: Tensor,
    y: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: float | Tensor | None = None,
    kind: Kind = "clip",
    labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    first: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Contrastive loss of the rows of x against the rows of y, ``z_ij = scale x_i . y_j + bias``.

    The mean over the M rows of x of, with ``o_i = first + i`` the row of y that belongs to row i:

    - ``"clip"`` (CLIP, arXiv 2103.00020): ``(lse_j z_ij + lse_j z_ji) / 2 - z_ii``, M = N.
    - ``"infonce"``, one direction of it (arXiv 1807.03748): ``lse_j z_ij - z_{i, o_i}``.
    - ``"siglip"`` (arXiv 2303.15343): ``sum_{j != o_i} softplus(z_ij) + softplus(-z_{i, o_i})``.
    - ``"supcon"`` (arXiv 2004.11362): ``lse_{j != o_i} z_ij - mean_{j in P_i} z_ij``, P_i the other rows of y with the
      label of row i, 0 where there are none. With a label per image and several views of it this is SimCLR's loss.

    Loss and gradients are made in one call, tile by tile: memory is the gradients and at most 32 MiB (on a GPU 1 GiB)
    of scores. M N d multiply-adds are a product: with both gradients siglip takes 3, clip and infonce 3 to 4 (4 on a
    GPU), supcon of x with itself 1.5 to 2.

    Across processes the caller gathers the columns, with an autograd-aware gather, and every process takes its own
    rows against all columns: ``first`` is its rank times M (``kind="clip"`` is then the mean of two "infonce").
    Gradients averaged over the processes, as DDP does, are those of one process with the whole batch.

    Args:
        x: ``[M, d]``, float32, bfloat16, float16 or float64; rows of unit norm are the caller's job.
        y: ``[N, d]`` of the dtype and device of x; None is x, with ``"supcon"`` only.
        scale: a number or a tensor of one number: the inverse temperature, ``logit_scale.exp()``.
        bias: a number, a tensor of one number or None; with ``"siglip"`` only (in a softmax it cancels).
        kind: see above.
        labels: int64 ``[M]``, with ``"supcon"`` only.
        column_labels: int64 ``[N]``, labels of the rows of y, where y is given.
        first: which row of y belongs to row 0 of x.
        reduction: ``"valid_mean"`` divides by the number of rows that have positives, not by M; with ``"supcon"`` only.

    Returns:
        A scalar, float32 (float64 for float64 inputs); 0 for no rows. Differentiable, once, in x, y, scale and bias.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x = torch.eye(2)
        >>> w2s_fast.contrastive_loss(x, x, 2.0)
        tensor(0.1269)
    """
    checks.choice(NAME, "kind", kind, KINDS)
    checks.choice(NAME, "reduction", reduction, ("mean", "valid_mean"))
    checks.is_float_tensor(NAME, "x", x)
    if x.ndim != 2:
        checks.fail(NAME, "x", "of shape (M, d)", tuple(x.shape))
    if kind != "supcon":
        for name, value in (("labels", labels), ("column_labels", column_labels)):
            if value is not None:
                checks.fail(NAME, name, "None without kind 'supcon'", type(value).__name__)
        if reduction != "mean":
            checks.fail(NAME, "reduction", "'mean' without kind 'supcon'", repr(reduction))
    columns = _check_columns(x, y, kind, first)
    if kind == "supcon":
        _check_labels(x, y, labels, column_labels, columns)
    elif bias is not None and kind != "siglip":
        checks.fail(NAME, "bias", f"None with kind {kind!r}, where it cancels", bias)
    given_scale, given_bias = _scalar("scale", scale, x), None if bias is None else _scalar("bias", bias, x)
    x, y = autocast.linear(x, y)
    x, y = separate_rows(x), None if y is None else separate_rows(y)
    need_x, need_y = wants_grad(x), wants_grad(y)
    need_scale = wants_grad(given_scale, given_bias)
    found: reference.Contrastive = CONTRASTIVE_LOSS(
        x, y, given_scale, given_bias, labels, column_labels, kind, first, need_x, need_y, need_scale
    )
    if reduction == "mean":
        return found.loss
    return found.loss * x.shape[0] / (found.positives > 0).sum().clamp_min(1)


def _check_columns(x: Tensor, y: Any, kind: str, first: Any) -> int:
    """N, the number of columns."""
    rows = x.shape[0]
    checks.integer(NAME, "first", first, low=0)
    if y is None:
        if kind != "supcon":
            checks.fail(NAME, "y", "a tensor (None is x, with kind 'supcon' only)", None, error=TypeError)
        if first:
            checks.fail(NAME, "first", "0 where y is not given", first)
        return rows
    checks.is_float_tensor(NAME, "y", y)
    if y.ndim != 2 or y.shape[1] != x.shape[1]:
        checks.fail(NAME, "y", f"of shape (N, {x.shape[1]})", tuple(y.shape))
    if y.dtype != x.dtype and autocast.dtype_of(x.device) is None:
        checks.fail(NAME, "y", f"of the dtype of x, {x.dtype}", y.dtype, error=TypeError)
    checks.same_device(NAME, [("x", x), ("y", y)])
    if kind == "clip" and (y.shape[0] != rows or first):
        if first:
            checks.fail(NAME, "first", "0 with kind 'clip'", first, "Take the mean of two 'infonce'.")
        checks.fail(NAME, "y", f"of shape {tuple(x.shape)}, that of x, with kind 'clip'", tuple(y.shape))
    if first + rows > y.shape[0]:
        checks.fail(NAME, "y", f"of at least first + M = {first + rows} rows", y.shape[0])
    return int(y.shape[0])


def _check_labels(x: Tensor, y: Tensor | None, labels: Any, column_labels: Any, columns: int) -> None:
    if y is None and column_labels is not None:
        checks.fail(NAME, "column_labels", "None where y is not given", type(column_labels).__name__)
    given = [("labels", labels, x.shape[0])] + ([] if y is None else [("column_labels", column_labels, columns)])
    for name, value, size in given:
        checks.is_tensor(NAME, name, value, "an int64 tensor with kind 'supcon'")
        if value.dtype != torch.int64:
            checks.fail(NAME, name, "int64", value.dtype, error=TypeError)
        if value.shape != (size,):
            checks.fail(NAME, name, f"of shape ({size},)", tuple(value.shape))
        checks.same_device(NAME, [("x", x), (name, value)])


def _scalar(name: str, value: Any, x: Tensor) -> Tensor:
    """A number or a tensor of one number as a tensor ``[]``."""
    if not isinstance(value, Tensor):
        return torch.full((), checks.number(NAME, name, value), dtype=accumulate_dtype(x), device=x.device)
    checks.is_float_tensor(NAME, name, value)
    if value.numel() != 1:
        checks.fail(NAME, name, "a number or a tensor of one number", f"shape {tuple(value.shape)}")
    checks.same_device(NAME, [("x", x), (name, value)])
    return value.reshape(())
