"""linear_fusion_cross_entropy: cross-entropy of fused heads with the [T, V] logits never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...reference.linear_loss.arguments import Target
from ...values import all_inside
from .ce import cross_entropy
from .inputs import Weights, fused_logits, linear, logit_bytes, needs, targets, token_ids
from .logprobs import logprobs


def _plain(
    hiddens: Sequence[Tensor], lm_heads: Sequence[Tensor], target: Tensor, weights: Weights | None = None, *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Any:  # fmt: skip
    if target.ndim == 0 or not all_inside(target, lm_heads[0].shape[0]):
        return NotImplemented
    z = fused_logits(hiddens, lm_heads, weights)
    if z is NotImplemented:
        return z
    loss = F.cross_entropy(z, token_ids(target), reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _logits(hiddens: Sequence[Tensor], lm_heads: Sequence[Tensor], *_: Any, **options: Any) -> float:
    return logit_bytes(hiddens[0], lm_heads[0])


@or_plain(_plain, _logits)
def linear_fusion_cross_entropy(
    hiddens: Sequence[Tensor],
    lm_heads: Sequence[Tensor],
    target: Tensor,
    weights: Weights | None = None,
    *,
    biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    vocab_size: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a fusion of n heads; the ``[T, V]`` logits are never formed.

    ``loss_t = lse_t - z_t[target]`` with ``z_t = (1 / temperature) sum_i w_i (W_i h_i + b_i)``: what proxy-tuning or
    GenARM would sample from, as a training loss. ``weights=(1, 1, -1)`` is a large model, an expert and its
    anti-expert.

    Args:
        hiddens, lm_heads, target, weights, biases, temperature, softcap, ignore_index, vocab_size: see
            `linear_fusion_logprobs`.
        reduction: ``"mean"`` over the rows that are not ignored (0 if there are none), ``"sum"`` or ``"none"``.
        return_lse: also return lse of the leading shape.

    Returns:
        loss, a scalar or of the leading shape, float32 (float64 for float64 inputs); with ``return_lse`` also lse.
        Differentiable, once, in hiddens, heads, biases and weights. Trainable heads with ``"mean"`` or ``"sum"`` get
        their gradients in the forward pass, whose logits lie for a moment in the memory of the heads' gradients
        and, on a CPU, in at most as much again (and at most 64 MiB).

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.linear_fusion_cross_entropy([torch.ones(1, 2)], [torch.zeros(4, 2)], torch.tensor([1]))
        tensor(1.3863)
    """
    op = "linear_fusion_cross_entropy"
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    given, batch = linear(op, hiddens, lm_heads, weights, biases, temperature, softcap, vocab_size)
    target = targets(op, target, batch, given, ignore_index)
    keep = target != ignore_index
    count = keep.sum().clamp_min(1) if reduction == "mean" else torch.ones((), dtype=torch.int64, device=keep.device)
    trainable = bool(needs(given.heads) or needs(given.biases))
    if trainable and reduction != "none" and not return_lse:
        q = Target(keep, target.unsqueeze(1), target.new_ones((target.shape[0], 1), dtype=given.accumulate))
        return cross_entropy(given, q, keep.to(given.accumulate) / count, 0.0, False, False, True).loss
    logp, lse = logprobs(given, target, ignore_index)
    loss = -logp.reshape(batch) if reduction == "none" else -logp.sum() / count
    return (loss, lse.reshape(batch)) if return_lse else loss
