"""linear_ce: cross-entropy of one head, with hard, smoothed, mixed, sparse soft or dense targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...reference.linear_loss.arguments import Linear, Target
from ...values import all_inside
from ..layout import separate_rows
from .ce import cross_entropy
from .inputs import logit_bytes, needs, single, targets, token_ids, wide_logits
from .logp import token_weights
from .logprobs import logprobs

OP = "linear_ce"
OUTPUTS = ("logp", "lse", "entropy", "argmax", "maxprob", "correct")
MOST_IDS = 64


def _numbers(name: str, value: Any, shape: tuple[int, ...], given: Linear) -> Tensor:
    """A float tensor of that shape (or a number for all) in the accumulation dtype, without gradient."""
    if isinstance(value, Tensor):
        checks.is_float_tensor(OP, name, value)
        if value.shape != shape:
            checks.fail(OP, name, f"of shape {tuple(shape)}", tuple(value.shape))
        checks.same_device(OP, [("h", given.hiddens[0]), (name, value)])
        return value.detach().to(given.accumulate)
    number = checks.number(OP, name, value)
    return given.hiddens[0].new_full(shape, number, dtype=given.accumulate)


def _at_least_zero(name: str, value: Tensor) -> None:
    if checks.readable(value) and bool((value < 0).any()):
        checks.fail(OP, name, ">= 0", value[value < 0][0].item())


def _hard(given: Linear, batch: torch.Size, target: Any, target2: Any, mix: Any, ignore_index: int) -> Target:
    y = targets(OP, target, batch, given, ignore_index, error=IndexError)
    keep = y != ignore_index
    if target2 is None:
        if mix is not None:
            checks.fail(OP, "target2", "given where mix is", None)
        return Target(keep, y.unsqueeze(1), torch.ones((y.shape[0], 1), dtype=given.accumulate, device=y.device))
    second = targets(OP, target2, batch, given, ignore_index, name="target2", error=IndexError)
    if mix is None:
        checks.fail(OP, "mix", "given where target2 is", None)
    share = _numbers("mix", mix, batch, given).reshape(-1)
    _at_least_zero("mix", torch.minimum(share, 1 - share))
    ids = torch.stack((y, torch.where(second == ignore_index, -1, second)), 1)
    return Target(keep, ids, torch.stack((share, 1 - share), 1))


def _sparse(given: Linear, batch: torch.Size, ids: Any, probs: Any, uniform: Any, ignore_index: int) -> Target:
    checks.is_tensor(OP, "topk_ids", ids)
    if ids.ndim != len(batch) + 1 or not 1 <= ids.shape[-1] <= MOST_IDS:
        checks.fail(OP, "topk_ids", f"of shape {(*batch, 'K')} with K in [1, {MOST_IDS}]", tuple(ids.shape))
    whole = torch.Size((*batch, ids.shape[-1]))
    flat = targets(OP, ids, whole, given, ignore_index, name="topk_ids", error=IndexError).reshape(-1, ids.shape[-1])
    if probs is None:
        checks.fail(OP, "topk_probs", "given where topk_ids are", None)
    p = _numbers("topk_probs", probs, tuple(whole), given).reshape(flat.shape)
    _at_least_zero("topk_probs", p)
    there = flat != ignore_index
    rest = None if uniform is None else _numbers("uniform", uniform, tuple(batch), given).reshape(-1).contiguous()
    if rest is not None:
        _at_least_zero("uniform", rest)
    return Target(there.any(1), torch.where(there, flat, -1), torch.where(there, p, 0.0), rest)


def _dense(given: Linear, batch: torch.Size, soft_target: Any) -> Target:
    checks.is_float_tensor(OP, "soft_target", soft_target)
    if soft_target.shape != (*batch, given.vocab_size):
        checks.fail(OP, "soft_target", f"of shape {(*batch, given.vocab_size)}", tuple(soft_target.shape))
    q = separate_rows(soft_target.detach().reshape(batch.numel(), given.vocab_size))
    checks.same_device(OP, [("h", given.hiddens[0]), ("soft_target", q)])
    none = torch.full((q.shape[0], 1), -1, device=q.device)
    keep = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    return Target(keep, none, torch.zeros_like(none, dtype=given.accumulate), None, q)


def _smoothed(q: Target, eps: float, given: Linear) -> Target:
    """(1 - eps) q + eps / V."""
    if not eps:
        return q
    rest = torch.full_like(q.probs[:, 0], eps / given.vocab_size)
    return q._replace(
        probs=(1 - eps) * q.probs,
        uniform=rest if q.uniform is None else rest + (1 - eps) * q.uniform,
        dense=None if q.dense is None else (1 - eps) * q.dense,
    )


def _classes(class_weight: Any, given: Linear) -> Tensor | None:
    if class_weight is None:
        return None
    checks.is_float_tensor(OP, "class_weight", class_weight)
    if class_weight.shape != (given.vocab_size,):
        wanted = f"of shape {(given.vocab_size,)}, one number a class"
        checks.fail(OP, "class_weight", wanted, tuple(class_weight.shape))
    checks.same_device(OP, [("h", given.hiddens[0]), ("class_weight", class_weight)])
    found: Tensor = class_weight.detach().to(given.accumulate).contiguous()
    return found


def _row_weights(
    weights: Tensor | None, keep: Tensor, own: Tensor | None, reduction: str, denominator: Any, given: Linear
) -> Tensor:
    """What a row's loss is multiplied with in the sum; ``own`` are the class weights of hard labels, which a mean is
    over."""
    w = keep.to(given.accumulate) if weights is None else torch.where(keep, weights.detach(), 0.0)
    if denominator is not None and reduction != "mean":
        checks.fail(OP, "denominator", "None unless reduction is 'mean'", type(denominator).__name__)
    if reduction != "mean":
        return w
    if denominator is None:
        total = (w if own is None else w * own).sum()
        return w / torch.where(total == 0, 1.0, total)
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            checks.fail(OP, "denominator", "one number", tuple(denominator.shape))
        return w / denominator.detach().reshape(()).to(w)
    return w / checks.number(OP, "denominator", denominator, low=0.0, open_low=True)


def _plain(
    h: Tensor, W: Tensor, target: Tensor | None = None, *, bias: Tensor | None = None, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Any:  # fmt: skip
    if target is None or target.ndim == 0 or not all_inside(target, W.shape[0]):
        return NotImplemented
    loss = F.cross_entropy(
        wide_logits(h, W, bias), token_ids(target), None, None, -100, None, reduction, label_smoothing
    )  # fmt: skip
    return loss.reshape(target.shape) if reduction == "none" else loss


def _logits(h: Tensor, W: Tensor, *_: Any, **options: Any) -> float:
    return logit_bytes(h, W)


@or_plain(_plain, _logits)
def linear_ce(
    h: Tensor,
    W: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_probs: Tensor | None = None,
    uniform: Tensor | float | None = None,
    soft_target: Tensor | None = None,
    target2: Tensor | None = None,
    mix: Tensor | float | None = None,
    weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    token_scaling: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Literal["none", "sum", "mean"] = "mean",
    denominator: float | Tensor | None = None,
    outputs: Sequence[Literal["logp", "lse", "entropy", "argmax", "maxprob", "correct"]] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy from hidden states; the ``[T, V]`` logits are never formed, ignored rows cost nothing.

    ``loss_t = weights_t s_t (-sum_v c_v q_tv log p_tv + z_loss lse_t^2)`` with ``z_t = (W h_t + bias) / temperature``,
    ``p = softmax(z)``, ``lse_t = log sum_v exp z_tv``, c the ``class_weight`` (1 without) and s 1, or, with
    ``token_scaling``, the probability p of the target, held fixed (DFT, arXiv 2508.05629). The target q is one of

    - hard: 1 at ``target``; with ``target2``, mix at ``target`` and 1 - mix there (mixup; a weak and a strong label);
    - sparse: ``topk_probs`` at ``topk_ids`` and ``uniform`` at every token (a stored teacher's top K and its remainder
      spread out, FKD, arXiv 2112.01528); ids that occur twice add up;
    - dense: ``soft_target``, for a caller that owns it anyway.

    ``label_smoothing`` eps makes it ``(1 - eps) q + eps / V``. No gradient goes to a target or to any weights.

    Args:
        h: final hidden states ``[..., D]``.
        W: the head ``[V, D]`` of the dtype of h: float32, bfloat16, float16 or float64.
        target: token ids of the leading shape, int64 or int32.
        bias: ``[V]`` or None.
        topk_ids, topk_probs: ``[..., K]`` with K <= 64; an id ``ignore_index`` is none, a row of none is ignored.
        uniform: a number or of the leading shape, with ``topk_ids``.
        soft_target: ``[..., V]``.
        target2, mix: of the leading shape; mix in [0, 1], or a number.
        weights: a number a row, any sign; rows of weight 0 cost nothing.
        class_weight: ``[V]``, the ``weight`` of `torch.nn.functional.cross_entropy`, and as there the mean over hard
            labels divides by the sum of their classes' weights (times ``weights``), that over other targets does not.
        label_smoothing: in [0, 1).
        token_scaling: multiplies a row's loss, gradient and z-loss by the probability of its target; for one hard
            target a row. A mean divides by the same number as without.
        ignore_index: rows with this target count nowhere, whatever their hidden state.
        temperature: > 0; the loss is of z as divided (no factor temperature^2).
        softcap: s makes the logits ``s tanh(x / s)``.
        z_loss: coefficient of the squared log-sum-exp.
        reduction: ``"mean"`` over the sum of the weights of the rows that count (0 if it is 0), ``"sum"``, ``"none"``.
            F.cross_entropy gives NaN where that sum is 0.
        denominator: what ``"mean"`` divides by instead (the tokens of all micro-batches, say).
        outputs: what else to return, of the leading shape, 0 in ignored rows: ``logp``, the mean log p over the target
            before smoothing (log p of a hard label); ``lse``; ``entropy`` of p; ``argmax``, the first of ties;
            ``maxprob``; ``correct``, whether argmax is the target.

    Returns:
        loss, a scalar or of the leading shape, float32 (float64 for float64 inputs); with outputs (loss, dict). loss,
        logp, lse and entropy are differentiable, once, in h, W and bias. Gradients of a mean or sum are made in the
        forward pass, three products in all; ``"none"`` and gradients of outputs compute the logits again.

    Raises:
        ValueError, TypeError: naming the argument. IndexError: on a CPU, for an id out of range.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.linear_ce(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([1, -100]))
        tensor(1.6094)
    """
    checks.choice(OP, "reduction", reduction, ("none", "sum", "mean"))
    if not isinstance(outputs, (list, tuple, set, frozenset)) or any(name not in OUTPUTS for name in outputs):
        checks.fail(OP, "outputs", f"a sequence of {', '.join(map(repr, OUTPUTS))}", repr(outputs))
    eps = checks.number(OP, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    if eps == 1:
        checks.fail(OP, "label_smoothing", "in [0, 1)", eps)
    z_loss = checks.number(OP, "z_loss", z_loss)
    given, batch = single(OP, h, W, bias, temperature, softcap)
    q = _target(given, batch, target, topk_ids, topk_probs, uniform, soft_target, target2, mix, ignore_index)
    if "correct" in outputs and (target is None or target2 is not None):
        checks.fail(OP, "outputs", "without 'correct' unless there is one hard target", repr(tuple(outputs)))
    if not isinstance(token_scaling, bool):
        checks.fail(OP, "token_scaling", "True or False", repr(token_scaling), error=TypeError)
    if token_scaling and (target is None or target2 is not None):
        checks.fail(OP, "token_scaling", "False unless there is one hard target", token_scaling)
    scale = token_weights(OP, weights, batch, given)
    hard = q.ids[:, 0] if target is not None and target2 is None else None
    classes = _classes(class_weight, given)
    own = None if classes is None or hard is None else torch.where(q.keep, classes[torch.where(q.keep, hard, 0)], 0.0)
    w = _row_weights(scale, q.keep, own, reduction, denominator, given)
    if own is not None and not eps and not z_loss:  # a weight of the row is all that it is then
        w, classes = w * own, None
    if not outputs:
        q = q._replace(keep=q.keep & (w != 0))
    if hard is not None and _kept_direction(given, eps, set(outputs)):
        settings = _RowLoss(eps, z_loss, token_scaling, classes)
        loss, found = _frozen(given, hard, q.keep, ignore_index, w, settings, reduction)
    else:
        entropy, best = "entropy" in outputs, bool({"argmax", "maxprob", "correct"} & set(outputs))
        smooth = _smoothed(q, eps, given)._replace(classes=classes)
        values = cross_entropy(given, smooth, w, z_loss, entropy, best, reduction != "none", token_scaling)
        found = {"logp": values.logp, "lse": values.lse, "entropy": values.entropy, "argmax": values.best,
                 "maxprob": values.largest}  # fmt: skip
        loss = values.loss if reduction != "none" else w * values.row
    loss = loss.reshape(batch) if reduction == "none" else loss
    if not outputs:
        return loss
    if "correct" in outputs:
        found["correct"] = (found["argmax"] == hard) & q.keep
    return loss, {name: found[name].reshape(batch) for name in outputs}


def _target(
    given: Linear,
    batch: torch.Size,
    target: Any,
    topk_ids: Any,
    topk_probs: Any,
    uniform: Any,
    soft_target: Any,
    target2: Any,
    mix: Any,
    ignore_index: Any,
) -> Target:
    if sum(x is not None for x in (target, topk_ids, soft_target)) != 1:
        checks.fail(OP, "target", "given, or topk_ids, or soft_target, and only one of them", "none or several")
    for name, value, owner, there in (
        ("topk_probs", topk_probs, "topk_ids", topk_ids),
        ("uniform", uniform, "topk_ids", topk_ids),
        ("target2", target2, "target", target),
        ("mix", mix, "target", target),
    ):
        if value is not None and there is None:
            checks.fail(OP, name, f"None without {owner}", type(value).__name__)
    if target is not None:
        return _hard(given, batch, target, target2, mix, ignore_index)
    if topk_ids is not None:
        return _sparse(given, batch, topk_ids, topk_probs, uniform, ignore_index)
    return _dense(given, batch, soft_target)


def _kept_direction(given: Linear, eps: float, outputs: set[str]) -> bool:
    """Whether the head is frozen and E_p[W], kept in forward, makes the gradient: two products instead of three."""
    frozen = not (needs(given.heads) or needs(given.biases))
    return frozen and bool(needs(given.hiddens)) and outputs <= {"logp", "lse"} and not (eps and given.softcap)


class _RowLoss(NamedTuple):
    """What a row's loss is besides its target and weight."""

    eps: float
    z_loss: float
    scaled: bool
    classes: Tensor | None


def _frozen(
    given: Linear, y: Tensor, keep: Tensor, ignore_index: int, w: Tensor, settings: _RowLoss, reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    eps, z_loss, scaled, classes = settings
    logp, lse = logprobs(given, torch.where(keep, y, ignore_index), ignore_index)
    own = 1 - eps if classes is None else (1 - eps) * classes[torch.where(keep, y, 0)]
    row = z_loss * lse.square() - own * logp if z_loss else -own * logp
    if eps:  # sum_v c_v z_tv = h_t . sum_v c_v W_v, without a softcap
        h, head, acc = given.hiddens[0], given.heads[0], given.accumulate
        with autocast.off(h.device):
            total = h.to(acc) @ (head.sum(0, dtype=acc) if classes is None else classes @ head.to(acc))
        if given.biases:
            bias = given.biases[0].to(acc)
            total = total + (bias if classes is None else torch.where(classes == 0, 0.0, classes * bias)).sum()
        mean = 1.0 if classes is None else classes.mean()
        row = row + eps * (mean * lse - total / (given.temperature * given.vocab_size))
    row = w * torch.where(keep, row, 0.0)
    if scaled:
        row = torch.where(w == 0, 0.0, row * logp.detach().exp())
    return row if reduction == "none" else row.sum(), {"logp": logp, "lse": lse}
