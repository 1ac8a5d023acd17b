"""The op under linear_preference for trainable heads: loss and gradients in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...library import Kernel, define
from ...reference.linear_loss import preference as reference
from .gradient import GRADIENTS, NEED, fake_gradients
from .inputs import LINEAR, Linear
from .stored import keep_gradients, stored_gradients


def _fake(*args: Any) -> tuple[Any, ...]:
    given, counts = Linear(*args[:8]), args[13]
    first, acc = given.hiddens[0], given.accumulate
    return (
        first.new_empty((), dtype=acc),
        first.new_empty(counts.shape, dtype=acc),
        first.new_empty(counts.shape, dtype=acc),
        *fake_gradients(given, args[23:]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    given = Linear(*inputs[:8])
    # the inputs only say what the gradients depend on
    keep_gradients(ctx, given, inputs[23:], output[3:], *given.hiddens, *given.heads, *given.biases)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> dict[str, Any]:
    return stored_gradients(ctx, grad, ctx.need)


LINEAR_PREFERENCE = define(
    "linear_preference",
    f"({LINEAR}, Tensor target, int ignore_index, Tensor? token_weights, Tensor? nll_target, Tensor segments, "
    "Tensor counts, Tensor? ref, bool mean, Tensor? pairs, Tensor? labels, Tensor? kl, Tensor? share, int[] forms, "
    f"float[] numbers, float scale, {NEED}) -> (Tensor loss, Tensor sums, Tensor nll, {GRADIENTS})",
    reference=reference.linear_preference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=Kernel(
        "kernels.linear_loss.preference:launch_linear_preference",
        "kernels.linear_loss.preference:supports_linear_preference",
        rowwise="hiddens heads",
    ),
)
