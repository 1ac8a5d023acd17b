"""prototype_distance: nearest prototypes, log-sum-exp and loss, with the [N, K] distances never held whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss.arguments import Coefficients, Linear, Need
from ...reference.numerics import accumulate_dtype
from ...reference.prototypes import prototype_distance as reference
from ...transforms import wants_grad
from ..layout import separate_rows
from ..linear_loss.gradient import LINEAR_LOSS_BACKWARD

Metric = Literal["sqeuclidean", "cosine"]
NAME = "prototype_distance"
#: The longest list of neighbours.
MOST = 64


class Nearest(NamedTuple):
    """distance ``[N, k]``, nearest first, indices int64 ``[N, k]``; lse and loss ``[N]``, None where not asked for."""

    distance: Tensor
    indices: Tensor
    lse: Tensor | None
    loss: Tensor | None


def _fake(
    x: Tensor, prototypes: Tensor, offset: Tensor, labels: Tensor | None, temperature: float, k: int, need_lse: bool,
    need_square: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc, rows = accumulate_dtype(x, prototypes), x.shape[0]
    return (
        x.new_empty((rows, k), dtype=acc),
        x.new_empty((rows, k), dtype=torch.int64),
        x.new_empty(rows if need_lse else 0, dtype=acc),
        x.new_empty(0 if labels is None else rows, dtype=acc),
        x.new_empty(rows if need_square else 0, dtype=acc),
    )


def _backward(call: Call, grads: reference.Scores) -> dict[str, Any]:
    """The scores are logits of a head with a bias: the gradient is that of the linear losses, scores made again."""
    x, index, lse = call.x, call.out.indices, call.out.lse
    if not call.need_lse:
        lse = PROTOTYPE_DISTANCE.on(call.backend)(
            x, call.prototypes, call.offset, None, call.temperature, 1, need_lse=True, need_square=False
        ).lse
    ids, coefs = index, torch.zeros_like(index, dtype=lse.dtype) if grads.top is None else grads.top.to(lse.dtype)
    if call.labels is not None and grads.at_label is not None:
        ids, coefs = torch.cat((ids, call.labels.unsqueeze(1)), 1), torch.cat((coefs, grads.at_label.unsqueeze(1)), 1)
    coef_lse = grads.lse if call.need_lse and grads.lse is not None else torch.zeros_like(lse)
    model = Linear([x], [call.prototypes], [call.offset], None, [1.0], call.temperature, 0.0, len(call.prototypes))
    need = Need(int(call.needs.x), int(call.needs.prototypes), int(call.needs.offset), False)
    given = Coefficients(lse, ids, torch.where(ids < 0, 0.0, coefs), coef_lse.contiguous())
    found = LINEAR_LOSS_BACKWARD.on(call.backend)(model, given, need, None)
    dx = found.dhiddens[0]
    if call.needs.x and call.need_square and grads.square is not None:
        dx = dx + (2 * grads.square.unsqueeze(1) * x.to(lse.dtype)).to(x.dtype)
    return {"x": dx, "prototypes": found.dheads[0], "offset": found.dbiases[0]}


PROTOTYPE_DISTANCE = define(
    reference.prototype_distance,
    fake=_fake,
    backward=_backward,
    saves="x prototypes offset labels indices lse",
    carriers="top lse at_label square",
    triton=Kernel(rowwise="x prototypes"),
)


def prototype_distance(
    x: Tensor,
    prototypes: Tensor,
    labels: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    metric: Metric = "sqeuclidean",
    temperature: float = 1.0,
    k: int = 1,
    return_lse: bool = False,
) -> Nearest:
    """The nearest prototypes of every row, and the softmax over all of them as a loss, in one pass over tiles.

    ``"sqeuclidean"``: ``d_nk = |x_n - p_k|^2`` and ``s_nk = -d_nk / temperature`` (prototypical networks,
    arXiv 1703.05175; nearest mean on frozen features, arXiv 2210.04428). ``"cosine"``: ``d_nk = 1 - cos(x_n, p_k)`` and
    ``s_nk = cos(x_n, p_k) / temperature``. Distances are differences of products, ``|x|^2 + |p|^2 - 2 x . p``, which
    loses digits where all lie close together far from the origin; they are never negative.

    Args:
        x: ``[N, D]``, float32, bfloat16, float16 or float64.
        prototypes: ``[K, D]`` of the dtype and device of x, K at least 1.
        labels: int64 ``[N]``, the class of every row, for its loss.
        valid: bool ``[K]``; classes without a prototype are left out, whatever their rows hold.
        metric: see above; for ``"cosine"`` a norm counts as at least 1e-12.
        temperature: a positive number.
        k: how many neighbours, 1 to 64 and at most K; a GPU makes the whole [N, K] for more than 8.
        return_lse: whether ``lse_n = log sum_k exp s_nk`` is returned.

    Returns:
        Nearest: distance and indices ``[N, k]``, equal distances by index (infinite and -1 where fewer than k classes
        are valid, NaN and -1 in rows with a NaN); lse ``[N]`` or None; with labels ``loss_n = lse_n - s_n[labels_n]``
        ``[N]``, infinite where the class is not valid. float32 (float64 for float64 inputs). Differentiable, once, in x
        and prototypes. Memory: those and, on a CPU, a tile of at most 4 MiB.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, prototypes = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])
        >>> found = w2s_fast.prototype_distance(x, prototypes, torch.tensor([1]))
        >>> found.distance, found.indices, found.loss
        (tensor([[1.]]), tensor([[0]]), tensor([3.0486]))
    """
    checks.choice(NAME, "metric", metric, ("sqeuclidean", "cosine"))
    _check(x, prototypes, labels, valid)
    checks.integer(NAME, "k", k, low=1, high=min(MOST, prototypes.shape[0]))
    tau = checks.temperature(NAME, temperature)
    x, p = autocast.linear(x, prototypes)
    if valid is not None:
        p = torch.where(valid.unsqueeze(1), p, 0.0)
    x, p, acc = separate_rows(x), separate_rows(p), accumulate_dtype(x, p)  # torch's sums depend on strides
    if metric == "cosine":
        x, p = (F.normalize(t.to(acc), dim=1) for t in (x, p))  # rounded again they would change the order
        offset = torch.zeros(p.shape[0], dtype=acc, device=p.device)
    else:
        offset = -0.5 * torch.linalg.vector_norm(p, dim=1, dtype=acc).square()
    if valid is not None:
        offset = torch.where(valid, offset, -torch.inf)
    inner = tau if metric == "cosine" else tau / 2
    need_lse = return_lse or labels is not None or wants_grad(x, p)
    found: reference.Scores = PROTOTYPE_DISTANCE(
        x, p, offset, labels, inner, k, need_lse, metric == "sqeuclidean"
    )
    loss = None if labels is None else found.lse - found.at_label
    lse = found.lse if return_lse else None
    if metric == "cosine":
        distance = 1 - tau * found.top
    else:
        distance = found.square.unsqueeze(1) - tau * found.top
        lse = None if lse is None else lse - found.square / tau
    return Nearest(distance.clamp(min=0), found.indices, lse, loss)


def _check(x: Any, prototypes: Any, labels: Any, valid: Any) -> None:
    checks.is_float_tensor(NAME, "x", x)
    if x.ndim != 2:
        checks.fail(NAME, "x", "of shape (N, D)", tuple(x.shape))
    checks.is_float_tensor(NAME, "prototypes", prototypes)
    if prototypes.ndim != 2 or prototypes.shape[1] != x.shape[1] or not prototypes.shape[0]:
        checks.fail(NAME, "prototypes", f"of shape (K, {x.shape[1]}) with K >= 1", tuple(prototypes.shape))
    if prototypes.dtype != x.dtype and autocast.dtype_of(x.device) is None:
        checks.fail(NAME, "prototypes", f"of the dtype of x, {x.dtype}", prototypes.dtype, error=TypeError)
    given = (("labels", labels, torch.int64, x.shape[0]), ("valid", valid, torch.bool, prototypes.shape[0]))
    for name, value, dtype, size in given:
        if value is None:
            continue
        checks.is_tensor(NAME, name, value)
        if value.dtype != dtype:
            checks.fail(NAME, name, str(dtype)[6:], value.dtype, error=TypeError)
        if value.shape != (size,):
            checks.fail(NAME, name, f"of shape ({size},)", tuple(value.shape))
    checks.same_device(NAME, [("x", x), ("prototypes", prototypes), ("labels", labels), ("valid", valid)])
    if labels is not None:
        checks.index_range(NAME, "labels", labels, prototypes.shape[0])
