"""Any loss over a causal language model's head: a function of hidden states and head inside the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ... import checks
from .deferred import DeferredLogits, Head, deferred
from .fused_loss import check_head, unwrap

OP = "integrations.transformers.through_head"


def through_head(model: Any, fused: Callable[[Tensor, Head], Any], **inputs: Any) -> Any:
    """``fused(hidden, head)`` of a forward pass of ``model(**inputs)``; the ``[B, S, V]`` logits are not made.

    The model's own forward runs, whatever its class, to its logits; the function is called inside, where FSDP2 has
    gathered the head. A model of the caller that `fused` leaves without gradient costs no graph.

    Args:
        model: a causal language model of transformers with a linear head, a PEFT model around one, or either inside
            DistributedDataParallel.
        fused: of the last hidden states ``[B, S, D]`` and the head's weight, bias, temperature and cap.
        inputs: of the model's forward, by name, without labels.

    Raises:
        ValueError: a model without a plain linear head, or one that does more with its logits than scale and cap them.
    """
    inner: Any = unwrap(getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model)
    check_head(inner, OP)
    before, own = inner.__dict__.get("forward"), inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with deferred(inner.get_output_embeddings()):
            logits = own(*args, **{**kwargs, "return_dict": True}).logits
            if type(logits) is not DeferredLogits or not logits.pending:
                checks.fail(OP, "model", "one whose logits are its head's, scaled or capped", type(inner).__name__)
            return logits.through(fused)

    inner.__dict__["forward"] = forward
    try:
        return model(**inputs, use_cache=False)
    finally:
        if before is None:
            inner.__dict__.pop("forward")
        else:
            inner.__dict__["forward"] = before
