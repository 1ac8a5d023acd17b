"""linear_fusion_logprobs: the log-probability of each target token under fused heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import fusion as reference
from ...reference.linear_loss.arguments import Coefficients, Linear, Need
from ...values import all_inside
from .gradient import LINEAR_LOSS_BACKWARD, by_name, wanted
from .inputs import Weights, fused_logits, keeps_logits, kept_shape, linear, logit_bytes, need_of, targets


def _fake(
    model: Linear, target: Tensor, ignore_index: int, need_rows: bool, need_logits: bool, need_kept: bool
) -> tuple[Tensor, ...]:
    first, rows, acc = model.hiddens[0], model.rows, model.accumulate
    width = sum(h.shape[1] for h in model.hiddens)
    return (
        first.new_empty((rows,), dtype=acc),
        first.new_empty((rows,), dtype=acc),
        first.new_empty((rows, width) if need_rows else (0,), dtype=acc),
        first.new_empty((rows, len(model.hiddens)) if need_logits else (0,), dtype=acc),
        first.new_empty(kept_shape(model) if need_kept else (0,), dtype=acc),
    )


def _backward(call: Call, grads: reference.LogProbs) -> dict[str, Any]:
    given, target, lse, need = call.model, call.target, call.out.lse, wanted(call)
    grad_logp = torch.zeros_like(lse) if grads.logp is None else grads.logp
    grad_lse = torch.zeros_like(lse) if grads.lse is None else grads.lse
    trained = need.need_heads or need.need_biases
    if trained or not call.need_rows or (need.need_weights and not call.need_logits):
        keep = target != call.ignore_index
        picked, spread = (torch.where(keep, g, 0.0) for g in (grad_logp, grad_lse - grad_logp))
        kept = call.out.kept if call.need_kept else None
        coef = Coefficients(lse, target.unsqueeze(1), picked.unsqueeze(1), spread)
        return by_name(LINEAR_LOSS_BACKWARD.on(call.backend)(given, coef, need, kept), need, given.weights)
    return _from_expectations(call, grad_logp, grad_lse, need)


def _from_expectations(call: Call, grad_logp: Tensor, grad_lse: Tensor, need: Need) -> dict[str, Any]:
    """Frozen heads: d logp_t / d h_i = scale_i (W_i[y] - E_p W_i) needs the kept expectations only, no pass over V."""
    given, target, rows, logits = call.model, call.target, call.out.mean_rows, call.out.mean_logits
    keep = target != call.ignore_index
    y = torch.where(keep, target, 0)
    a = torch.where(keep, grad_logp, 0.0).unsqueeze(1)
    b = torch.where(keep, grad_lse - grad_logp, 0.0).unsqueeze(1)
    dhiddens: list[Tensor | None] = []
    at_target, start = [], 0
    for i, (h, head) in enumerate(zip(given.hiddens, given.heads, strict=True)):
        own = head[y].to(rows.dtype)
        mean, start = rows[:, start : start + h.shape[1]], start + h.shape[1]
        if need.need_weights or given.softcap:
            part = (h.to(own.dtype) * own).sum(1, keepdim=True)
            part = part + given.biases[i][y].to(own.dtype).unsqueeze(1) if given.biases else part
            if given.softcap:
                unit = torch.tanh(part / given.softcap)
                part, own = given.softcap * unit, own * (1 - unit.square())
            at_target.append(part)
        scale = given.weight_values[i] if given.weights is None else given.weights[:, i : i + 1].to(own.dtype)
        asked = need.need_hiddens >> i & 1
        dhiddens.append(((a * own + b * mean) * (scale / given.temperature)).to(h.dtype) if asked else None)
    dweights = None
    if need.need_weights and given.weights is not None:
        dweights = (a * torch.cat(at_target, 1) + b * logits) / given.temperature
        dweights = dweights.to(given.weights.dtype)
    return {
        "hiddens": dhiddens,
        "heads": [None] * len(given.heads),
        "biases": [None] * len(given.biases),
        "weights": dweights,
    }


LINEAR_FUSION_LOGPROBS = define(
    reference.linear_fusion_logprobs,
    fake=_fake,
    backward=_backward,
    saves="hiddens heads biases weights target lse mean_rows mean_logits kept",
    carriers="logp lse",
    triton=Kernel(rowwise="hiddens heads"),
)


def logprobs(given: Linear, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logp and lse of checked rows; keeps what a backward with frozen heads needs, and only if there will be one."""
    need = need_of(given)
    rows = not (need.need_heads or need.need_biases) and bool(need.need_hiddens or need.need_weights)
    kept = not rows and keeps_logits(given, target != ignore_index)
    found = LINEAR_FUSION_LOGPROBS(given, target, ignore_index, rows, rows and need.need_weights, kept)
    return found.logp, found.lse


def _plain(
    hiddens: Sequence[Tensor], lm_heads: Sequence[Tensor], target: Tensor, weights: Weights | None = None
) -> Any:
    if target.ndim == 0 or not all_inside(target, lm_heads[0].shape[0]):
        return NotImplemented
    z = fused_logits(hiddens, lm_heads, weights)
    if z is NotImplemented:
        return z
    index = target.long().unsqueeze(-1)
    # torch.logsumexp takes several passes, log_softmax one
    logp = z.log_softmax(-1).gather(-1, index).squeeze(-1)
    return logp, z.gather(-1, index).squeeze(-1) - logp


def _logits(hiddens: Sequence[Tensor], lm_heads: Sequence[Tensor], *_: Any, **options: Any) -> float:
    return logit_bytes(hiddens[0], lm_heads[0])


@or_plain(_plain, _logits)
def linear_fusion_logprobs(
    hiddens: Sequence[Tensor],
    lm_heads: Sequence[Tensor],
    target: Tensor,
    weights: Weights | None = None,
    *,
    biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under the fusion of n heads; the ``[T, V]`` logits are never formed.

    ``z_t = (1 / temperature) sum_i w_i (W_i h_i + b_i)``, ``logp_t = z_t[target] - lse_t``. The n products run into one
    accumulator, with no concatenated copy of the heads. With one model this is the score that preference losses and
    weak-to-strong search (arXiv 2405.19262) sum over tokens.

    Args:
        hiddens: n final hidden states ``[..., D_i]``.
        lm_heads: n heads ``[V_i, D_i]`` of the dtype of their hidden: float32, bfloat16, float16 or float64.
        target: token ids of the leading shape, int64 or int32.
        weights: n numbers or a tensor ``[n]`` or ``[..., n]``, any sign; default all 1.
        biases: None or n of ``[V_i]`` (None for a model without).
        temperature: a number > 0.
        softcap: s replaces each model's logits x by ``s tanh(x / s)``.
        ignore_index: rows with this target cost nothing: logp and lse are 0, gradients are 0.
        vocab_size: columns that take part; default the smallest V_i. Others are never read.

    Returns:
        (logp, lse), each of the leading shape, float32 (float64 for float64 inputs). Differentiable, once, in hiddens,
        heads, biases and weights. With frozen heads forward keeps E_p[W] (T x sum D_i numbers) and backward does no
        pass over the vocabulary; with no gradient wanted, no gradient work is done. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> logp, lse = w2s_fast.linear_fusion_logprobs([torch.ones(1, 2)], [torch.zeros(4, 2)], torch.tensor([1]))
        >>> round(logp.item(), 4), round(lse.item(), 4)
        (-1.3863, 1.3863)
    """
    op = "linear_fusion_logprobs"
    given, batch = linear(op, hiddens, lm_heads, weights, biases, temperature, softcap, vocab_size)
    logp, lse = logprobs(given, targets(op, target, batch, given, ignore_index), ignore_index)
    return logp.reshape(batch), lse.reshape(batch)
