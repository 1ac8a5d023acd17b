"""The loss of an autoregressive reward model (GenARM, arXiv 2410.08193)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ... import checks, transforms
from ...calibration import or_plain
from ...values import all_inside
from ..numbers import number
from .inputs import linear, logit_bytes, targets, token_ids, wide_logits
from .logprobs import logprobs

_EXACT = 40  # beyond it log(1 + exp(x)) is x in float64 too


class ArmLoss(NamedTuple):
    """Fields: loss, a scalar; chosen_reward and rejected_reward ``[b]``, beta times the log-probabilities, detached."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def _settings(op: str, beta: float, gamma: float, label_smoothing: float) -> tuple[float, float, float]:
    beta = checks.number(op, "beta", beta, low=0.0, open_low=True)
    label_smoothing = checks.number(op, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    return beta, checks.number(op, "gamma", gamma), label_smoothing


def _loss(
    chosen_logps: Tensor, rejected_logps: Tensor, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0
) -> ArmLoss:
    """`arm_loss` of arguments that are known to be right."""
    chosen, rejected = chosen_logps, rejected_logps
    # a few operators are all there is: each that is left out is seen
    if chosen.dtype is not torch.float32 or rejected.dtype is not torch.float32:
        wide = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
        chosen, rejected = chosen.to(wide), rejected.to(wide)
    graded = chosen.requires_grad or rejected.requires_grad or transforms.active()
    better, worse = (chosen.detach() * beta, rejected.detach() * beta) if graded else (chosen * beta, rejected * beta)
    u = (rejected - chosen) * beta if graded else worse - better
    if gamma:
        u = u + gamma
    rows = softplus(u, threshold=_EXACT)
    if label_smoothing:
        rows = (1 - label_smoothing) * rows + label_smoothing * softplus(-u, threshold=_EXACT)
    loss = rows.mean() if rows.numel() else rows.sum()
    return ArmLoss(loss, better, worse)


def _plain_pairs(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> Any:
    chosen, rejected = chosen_logps, rejected_logps
    if chosen.dtype is not torch.float32 or rejected.dtype is not torch.float32:
        if torch.float64 in (chosen.dtype, rejected.dtype):
            return NotImplemented
        chosen, rejected = chosen.float(), rejected.float()
    pairs = chosen.shape[0]
    if not pairs:
        return NotImplemented
    scale = number(beta, chosen.dtype)
    if torch.is_grad_enabled() and (chosen.requires_grad or rejected.requires_grad):
        better, worse, u = chosen.detach() * scale, rejected.detach() * scale, (rejected - chosen) * scale
    else:
        better, worse = chosen * scale, rejected * scale
        u = worse - better
    return ArmLoss(softplus(u, 1, _EXACT).sum() * number(1 / pairs, u.dtype), better, worse)


@or_plain(_plain_pairs)
def arm_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0
) -> ArmLoss:
    """Preference loss of an autoregressive reward model, ``r(x, y) = sum_t log pi_r(y_t | x, y_<t)``, mean over pairs.

    ``u = beta (chosen - rejected) - gamma``, ``loss = -(1 - eps) log sigma(u) - eps log sigma(-u)``. There is no
    reference model; log-probabilities are summed over the response, not averaged.

    Args:
        chosen_logps, rejected_logps: ``[b]`` summed log-probabilities.
        beta: > 0.
        gamma: target margin.
        label_smoothing: eps in [0, 1].

    Returns:
        `ArmLoss`; the loss is differentiable in both arguments (0 for b = 0).

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> round(w2s_fast.arm_loss(torch.tensor([2.]), torch.tensor([0.]), beta=0.5).loss.item(), 6)
        0.313262
    """
    op = "arm_loss"
    beta, gamma, eps = _settings(op, beta, gamma, label_smoothing)
    for name, value in (("chosen_logps", chosen_logps), ("rejected_logps", rejected_logps)):
        checks.is_float_tensor(op, name, value)
    if chosen_logps.ndim != 1 or rejected_logps.shape != chosen_logps.shape:
        checks.fail(
            op,
            "rejected_logps",
            "one number a pair, like chosen_logps",
            f"shapes {tuple(rejected_logps.shape)} and {tuple(chosen_logps.shape)}",
        )
    checks.same_device(op, [("chosen_logps", chosen_logps), ("rejected_logps", rejected_logps)])
    return _loss(chosen_logps, rejected_logps, beta, gamma, eps)


def _plain(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0,
    *, bias: Tensor | None = None,
) -> Any:  # fmt: skip
    scored = labels[:, 1:]
    ids = token_ids(scored)
    if not all_inside(ids, lm_head.shape[0]):
        return NotImplemented
    z = wide_logits(hidden[:, :-1], lm_head, bias)
    logp = z.log_softmax(-1).gather(1, ids.unsqueeze(1)).reshape(scored.shape).sum(1)
    pairs = labels.shape[0] // 2
    return _loss(logp[:pairs], logp[pairs:], beta, gamma, label_smoothing)


def _logits(hidden: Tensor, lm_head: Tensor, *_: Any, **options: Any) -> float:
    return logit_bytes(hidden, lm_head)


@or_plain(_plain, _logits)
def linear_arm_loss(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> ArmLoss:
    """`arm_loss` from hidden states: memory grows with the tokens, not with tokens times vocabulary.

    The hidden state at position t scores the label at t + 1; positions whose label is ``ignore_index`` (prompt,
    padding) cost nothing.

    Args:
        hidden: ``[2b, S, D]``; rows 0..b-1 are the chosen sequences, b..2b-1 the rejected ones, in the same order.
        lm_head: ``[V, D]``.
        labels: ``[2b, S]`` int64 or int32, ``ignore_index`` outside the response.
        beta, gamma, label_smoothing: see `arm_loss`.
        bias: ``[V]`` or None.
        softcap, ignore_index, vocab_size: see `linear_fusion_logprobs`.

    Returns:
        `ArmLoss`; differentiable in hidden, lm_head and bias, once.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> labels = torch.tensor([[-100, 1], [-100, 2]])
        >>> round(w2s_fast.linear_arm_loss(torch.zeros(2, 2, 3), torch.ones(4, 3), labels, beta=1.0).loss.item(), 4)
        0.6931
    """
    op = "linear_arm_loss"
    _settings(op, beta, gamma, label_smoothing)
    checks.is_float_tensor(op, "hidden", hidden)
    if hidden.ndim != 3 or hidden.shape[0] % 2 or hidden.shape[1] < 1:
        checks.fail(op, "hidden", "of shape [2b, S, D]", tuple(hidden.shape))
    checks.is_tensor(op, "labels", labels)
    if labels.shape != hidden.shape[:2]:
        checks.fail(op, "labels", f"of shape {tuple(hidden.shape[:2])}", tuple(labels.shape))
    given, batch = linear(
        op, [hidden[:, :-1]], [lm_head], None, None if bias is None else [bias], 1.0, softcap, vocab_size
    )
    logp, _ = logprobs(given, targets(op, labels[:, 1:], batch, given, ignore_index), ignore_index)
    sums = logp.reshape(batch).sum(1)
    pairs = hidden.shape[0] // 2
    return arm_loss(sums[:pairs], sums[pairs:], beta, gamma, label_smoothing)
