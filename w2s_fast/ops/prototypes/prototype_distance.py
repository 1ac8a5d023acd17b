"""prototype_distance: nearest prototypes, log-sum-exp and loss, with the [N, K] distances never held whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss.arguments import Coefficients, Linear, Need
from ...reference.numerics import accumulate_dtype
from ...reference.prototypes import prototype_distance as reference
from ...transforms import wants_grad
from ...values import all_finite
from ..layout import separate_rows
from ..linear_loss.gradient import LINEAR_LOSS_BACKWARD
from ..numbers import number

Metric = Literal["sqeuclidean", "cosine"]
NAME = "prototype_distance"
#: The longest list of neighbours.
MOST = 64
#: The most memory that the products of a forward pass take for its backward, on a CPU.
KEPT_BYTES = 32 << 20


class Nearest(NamedTuple):
    """distance ``[N, k]``, nearest first, indices int64 ``[N, k]``; lse and loss ``[N]``; None where not asked for."""

    distance: Tensor | None
    indices: Tensor
    lse: Tensor | None
    loss: Tensor | None


def _fake(
    x: Tensor, prototypes: Tensor, offset: Tensor, labels: Tensor | None, temperature: float, k: int, need_lse: bool,
    need_square: bool, need_kept: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc, rows = accumulate_dtype(x, prototypes), x.shape[0]
    return (
        x.new_empty((rows, k), dtype=acc),
        x.new_empty((rows, k), dtype=torch.int64),
        x.new_empty(rows if need_lse else 0, dtype=acc),
        x.new_empty(0 if labels is None else rows, dtype=acc),
        x.new_empty(rows if need_square else 0, dtype=acc),
        x.new_empty((rows, _padded(len(prototypes))) if need_kept else 0, dtype=acc),
    )


def _padded(classes: int) -> int:
    return (classes + 15) // 16 * 16


def _backward(call: Call, grads: reference.Scores) -> dict[str, Any]:
    """The scores are logits of a head with a bias: the gradient is that of the linear losses, scores made again."""
    x, index, lse = call.x, call.out.indices, call.out.lse
    if not call.need_lse:
        lse = PROTOTYPE_DISTANCE.on(call.backend)(
            x, call.prototypes, call.offset, None, call.temperature, 1, True, False, False
        ).lse
    ids, coefs = index, torch.zeros_like(index, dtype=lse.dtype) if grads.top is None else grads.top.to(lse.dtype)
    if call.labels is not None and grads.at_label is not None:
        ids, coefs = torch.cat((ids, call.labels.unsqueeze(1)), 1), torch.cat((coefs, grads.at_label.unsqueeze(1)), 1)
    coef_lse = grads.lse if call.need_lse and grads.lse is not None else torch.zeros_like(lse)
    dx, dprototypes, doffset = _gradients(call, lse, ids, torch.where(ids < 0, 0.0, coefs), coef_lse.contiguous())
    if call.needs.x and call.need_square and grads.square is not None:
        dx = dx + (2 * grads.square.unsqueeze(1) * x.to(lse.dtype)).to(x.dtype)
    return {"x": dx, "prototypes": dprototypes, "offset": doffset}


def _gradients(call: Call, lse: Tensor, ids: Tensor, coefs: Tensor, coef_lse: Tensor) -> reference.ScoreGradients:
    needs, p = call.needs, call.prototypes
    if call.need_kept:
        made: reference.ScoreGradients = PROTOTYPE_DISTANCE_BACKWARD.on(call.backend)(
            call.x, p, call.offset, lse, ids, coefs, coef_lse, call.out.kept, call.temperature, needs.x,
            needs.prototypes, needs.offset,
        )  # fmt: skip
        return made
    model = Linear([call.x], [p], [call.offset], None, [1.0], call.temperature, 0.0, len(p))
    need = Need(int(needs.x), int(needs.prototypes), int(needs.offset), False)
    found = LINEAR_LOSS_BACKWARD.on(call.backend)(model, Coefficients(lse, ids, coefs, coef_lse), need, None)
    return reference.ScoreGradients(found.dhiddens[0], found.dheads[0], found.dbiases[0])


def _fake_gradients(
    x: Tensor, prototypes: Tensor, offset: Tensor, lse: Tensor, ids: Tensor, coef_ids: Tensor, coef_lse: Tensor,
    kept: Tensor, temperature: float, need_x: bool, need_prototypes: bool, need_offset: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = ((x, need_x), (prototypes, need_prototypes), (offset, need_offset))
    return tuple(t.new_empty(t.shape if need else 0) for t, need in given)


PROTOTYPE_DISTANCE_BACKWARD = define(
    reference.prototype_distance_backward, fake=_fake_gradients, triton=Kernel(rowwise="x prototypes kept")
)


PROTOTYPE_DISTANCE = define(
    reference.prototype_distance,
    fake=_fake,
    backward=_backward,
    saves="x prototypes offset labels indices lse kept",
    carriers="top lse at_label square",
    triton=Kernel(rowwise="x prototypes"),
)


def _plain(x: Tensor, prototypes: Tensor, *, return_distance: bool = True) -> Any:
    """The nearest alone, of a product that is held whole; `torch.max` takes the first of equal ones."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return NotImplemented
    offset = (prototypes * prototypes).sum(1) * number(-0.5, x.dtype)
    score, index = torch.addmm(offset, x, prototypes.t()).max(1, keepdim=True)
    if not all_finite(score):  # a NaN is the largest of its row
        return NotImplemented
    if not return_distance:
        return Nearest(None, index, None, None)
    square = (x * x).sum(1, keepdim=True)
    return Nearest(torch.add(square, score, alpha=-2.0).clamp(min=0), index, None, None)


def _products(x: Tensor, prototypes: Tensor, *_: Any, **options: Any) -> float:
    return 4.0 * max(len(x) * len(prototypes), x.numel())


@or_plain(_plain, _products)
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
    return_distance: bool = True,
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
        return_distance: whether distances are; without them squared Euclidean ones save a pass over x.

    Returns:
        Nearest: distance (or None) and indices ``[N, k]``, equal distances by index (infinite and -1 where fewer than k
        classes are valid, NaN and -1 in rows with a NaN); lse ``[N]`` or None; with labels
        ``loss_n = lse_n - s_n[labels_n]`` ``[N]``, infinite where the class is not valid. float32 (float64 for float64
        inputs). Differentiable, once, in x and prototypes. Memory: those and, on a CPU, a tile of at most 4 MiB; for a
        gradient of float32 rows the [N, K] products stay between forward and backward if they take no more than
        32 MiB, and are made again otherwise.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, prototypes = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> found = w2s_fast.prototype_distance(x, prototypes, torch.tensor([1]))
        >>> found.distance, found.indices, found.loss
        (tensor([[2.]]), tensor([[0]]), tensor([2.1269]))
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
    squared = metric == "sqeuclidean" and (return_distance or return_lse)
    found: reference.Scores = PROTOTYPE_DISTANCE(
        x, p, offset, labels, inner, k, need_lse, squared, _keeps_products(x, p)
    )
    loss = None if labels is None else found.lse - found.at_label
    lse = found.lse if return_lse else None
    if metric == "sqeuclidean" and lse is not None:
        lse = lse - found.square / tau
    distance = None
    if return_distance:
        distance = ((1.0 if metric == "cosine" else found.square.unsqueeze(1)) - tau * found.top).clamp(min=0)
    return Nearest(distance, found.indices, lse, loss)


def _keeps_products(x: Tensor, p: Tensor) -> bool:
    """Whether forward leaves x p^T for backward, which then saves one product of three; on a CPU alone."""
    if not (x.dtype == torch.float32 and wants_grad(x, p) and checks.readable(x)):
        return False
    return 4 * len(x) * _padded(len(p)) <= KEPT_BYTES


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
