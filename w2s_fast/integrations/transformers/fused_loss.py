"""A causal language model's own loss, from hidden states and head instead of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import checks
from ...ops.linear_loss.linear_ce import linear_ce

OP = "integrations.transformers.use_fused_loss"
#: Models whose logits are cap(head(hidden)) * multiply / divide, and what their configurations call these.
SUPPORTED: dict[str, dict[str, str]] = {
    **{
        name: {}
        for name in (
            "BloomForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM",
            "GPTNeoXForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "OPTForCausalLM",
            "Olmo2ForCausalLM", "OlmoForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM",
            "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
        )
    },
    "CohereForCausalLM": {"multiply": "logit_scale"},
    "Gemma2ForCausalLM": {"softcap": "final_logit_softcapping"},
    "Gemma3ForCausalLM": {"softcap": "final_logit_softcapping"},
    "GraniteForCausalLM": {"divide": "logits_scaling"},
}  # fmt: skip


class Head(NamedTuple):
    """A model's output head as the arguments of the linear losses: cap(weight h + bias) / temperature."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None

    def cast(self, hidden: Tensor) -> tuple[Tensor, Head]:
        """Hidden states and head as a linear layer would multiply them: under autocast in its dtype."""
        kind = hidden.device.type
        if not torch.is_autocast_enabled(kind):
            return hidden, self
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return hidden.to(dtype), self._replace(weight=self.weight.to(dtype), bias=bias)


def head_of(model: Any, op: str) -> Head:
    """The head of a supported model; ValueError for any other."""
    rule = next((SUPPORTED[c.__name__] for c in type(model).__mro__ if c.__name__ in SUPPORTED), None)
    if rule is None:
        checks.fail(op, "model", f"one of {', '.join(sorted(SUPPORTED))}", type(model).__name__)
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:  # an adapter around it would make its weight something else
        checks.fail(op, "model", "with a plain nn.Linear as head", type(layer).__name__)
    found = {name: getattr(model.config, setting) for name, setting in rule.items()}
    temperature = found.get("divide", 1.0) / found.get("multiply", 1.0)
    return Head(layer.weight, layer.bias, temperature, found.get("softcap"))


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """The label of the token behind each position."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)


class FusedLoss:
    """What `use_fused_loss` returns: `remove`, or leaving its ``with`` block, gives the model its own forward back."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def remove(self) -> None:
        """Undo; a second time is no error."""
        self._model.__dict__.pop("forward", None)

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use_fused_loss(model: Any) -> FusedLoss:
    """Make a causal language model compute its training loss without the ``[B, S, V]`` logits, in place.

    The same loss and gradients from `w2s_fast.linear_ce`: next-token labels (or ``shift_labels``),
    ``ignore_index``, ``num_items_in_batch`` of `Trainer` (gradient accumulation), final softcap and logit scales, tied
    embeddings, frozen heads, autocast. In training mode with labels the output has ``logits=None``; without labels,
    with ``logits_to_keep`` and in evaluation mode the model's own forward runs, logits and all.

    Args:
        model: one of `SUPPORTED`, or a PEFT model around one whose head has no adapter. Call this before FSDP or
            `Trainer` wrap the model's forward.

    Returns:
        A handle with ``remove()``; also a context manager.

    Raises:
        ValueError: an unsupported model, a loss or a forward that is not the class's own, an adapter on the head.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from w2s_fast.integrations.transformers import use_fused_loss
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2)).train()
        >>> ids = torch.arange(12).view(2, 6)
        >>> own = model(input_ids=ids, labels=ids).loss
        >>> with use_fused_loss(model):
        ...     output = model(input_ids=ids, labels=ids)
        >>> output.logits is None, torch.allclose(output.loss, own)
        (True, True)
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = unwrap(model)
    head_of(model, OP)
    if "forward" in model.__dict__:
        checks.fail(OP, "model", "with its class's own forward", "a forward that was replaced")
    if model.loss_function is not ForCausalLMLoss:
        checks.fail(OP, "model", "with transformers' causal loss", repr(model.loss_function))
    model.forward = MethodType(_forward_of(type(model)), model)
    return FusedLoss(model)


def _forward_of(kind: type) -> Callable[..., Any]:
    """The forward of a class of models with the fused loss in training mode."""
    own: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]
    names = list(inspect.signature(own).parameters)[1:]

    @wraps(own)  # its signature too: `Trainer` and `generate` look there for the arguments that a model takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels, shift_labels = given.get("labels"), given.get("shift_labels")
        keep = given.get("logits_to_keep", 0)
        partial = isinstance(keep, Tensor) or keep != 0
        if not self.training or partial or (labels is None and shift_labels is None):
            return own(self, **given)
        return _train(self, given)

    return forward


def _train(model: Any, given: dict[str, Any]) -> Any:
    from transformers.modeling_outputs import CausalLMOutput

    labels, shift_labels, count = (given.pop(n, None) for n in ("labels", "shift_labels", "num_items_in_batch"))
    ignore_index = given.pop("ignore_index", -100)
    return_dict = given.pop("return_dict", None)
    given.pop("logits_to_keep", None)
    made = model.get_decoder()(**given, return_dict=True)
    target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    loss = loss_of(head_of(model, OP), made.last_hidden_state, target, ignore_index, count)
    output = CausalLMOutput(loss=loss, hidden_states=made.hidden_states, attentions=made.attentions)
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def loss_of(head: Head, hidden: Tensor, target: Tensor, ignore_index: int, count: Tensor | int | None) -> Tensor:
    """Mean over the targets, or their sum divided by ``count``."""
    hidden, head = head.cast(hidden)
    loss = linear_ce(
        hidden, head.weight, target.to(hidden.device), bias=head.bias, temperature=head.temperature,
        softcap=head.softcap, ignore_index=ignore_index, denominator=count,
    )  # fmt: skip
    assert isinstance(loss, Tensor)  # not a pair: no other outputs were asked for
    return loss
