"""linear_fusion_cross_entropy: cross-entropy of fused heads with the [T, V] logits never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.linear_loss import fusion as reference
from .gradient import GRADIENTS, NEED, by_name, fake_gradients
from .inputs import LINEAR, Linear, Weights, linear, once, targets
from .logprobs import logprobs


def _fake(*args: Any) -> tuple[Any, ...]:
    given = Linear(*args[:8])
    return (given.hiddens[0].new_empty((), dtype=given.accumulate), *fake_gradients(given, args[11:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given, ctx.need = Linear(*inputs[:8]), inputs[11:]
    _, dhiddens, dheads, dbiases, dweights = output
    grads = (*dhiddens, *dheads, *dbiases, dweights)
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)  # or autograd makes zeros of the size of all heads for the other outputs
    ctx.counts = (len(given.hiddens), len(given.biases))
    ctx.save_for_backward(*grads, given.weights)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> dict[str, Any]:
    n, biased = ctx.counts
    *found, weights = ctx.saved_tensors
    if grad is None:
        return by_name((found[:n], found[n : 2 * n], found[2 * n : 2 * n + biased], found[-1]), (0, 0, 0, False), None)
    # the usual upstream gradient is 1: then the gradients go out as they are (a tracer's tensor is a subclass)
    if not (type(grad) is Tensor and grad.device.type == "cpu" and float(grad) == 1.0):
        found = [g * grad.to(g.dtype) if g.numel() else g for g in found]
    found = once("linear_fusion_cross_entropy", *found)
    lists = (found[:n], found[n : 2 * n], found[2 * n : 2 * n + biased], found[-1])
    return by_name(lists, ctx.need, weights)


LINEAR_FUSION_CROSS_ENTROPY = define(
    "linear_fusion_cross_entropy",
    f"({LINEAR}, Tensor target, int ignore_index, bool mean, {NEED}) -> (Tensor loss, {GRADIENTS})",
    reference=reference.linear_fusion_cross_entropy,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=Kernel(
        "kernels.linear_loss.fusion:launch_linear_fusion_cross_entropy",
        "kernels.linear_loss.fusion:supports_linear_fusion_cross_entropy",
    ),
)


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
        their gradients in the forward pass, whose logits lie for a moment in the memory of the heads' gradients.

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
    trainable = given.needs(given.heads), given.needs(given.biases)
    if any(trainable) and reduction != "none" and not return_lse:
        gates = bool(given.weights is not None and given.needs([given.weights]))
        loss: Tensor = LINEAR_FUSION_CROSS_ENTROPY(
            *given, target, ignore_index, reduction == "mean", given.needs(given.hiddens), *trainable, gates
        )[0]
        return loss
    logp, lse = logprobs(given, target, ignore_index)
    if reduction == "none":
        loss = -logp.reshape(batch)
    else:
        loss = -logp.sum()
        if reduction == "mean":
            loss = loss / (target != ignore_index).sum().clamp_min(1)
    return (loss, lse.reshape(batch)) if return_lse else loss
