"""The op under linear_preference for trainable heads: loss and gradients in one pass."""

from __future__ import annotations

from typing import Any

from ...library import Kernel, define
from ...reference.linear_loss import preference as reference
from ...reference.linear_loss.arguments import Compared, Linear, Need, Terms, Tokens
from .gradient import fake_gradients
from .stored import STORED, stored_gradients


def _fake(model: Linear, tokens: Tokens, compared: Compared, terms: Terms, need: Need) -> tuple[Any, ...]:
    first, acc, counts = model.hiddens[0], model.accumulate, compared.counts
    return (
        first.new_empty((), dtype=acc),
        first.new_empty(counts.shape, dtype=acc),
        first.new_empty(counts.shape, dtype=acc),
        *fake_gradients(model, need),
    )


LINEAR_PREFERENCE = define(
    reference.linear_preference,
    fake=_fake,
    backward=lambda call, grads: stored_gradients(call, grads.loss, call.need),
    saves=STORED,
    carriers="loss",
    triton=Kernel(rowwise="hiddens heads"),
)
