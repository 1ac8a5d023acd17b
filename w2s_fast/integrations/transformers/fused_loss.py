"""A causal language model's own loss, from hidden states and head instead of logits.

The model's own forward runs as it is. Its head yields `DeferredLogits`, which remember the hidden states and the scales
that the model applies, and the loss takes those to `w2s_fast.linear_ce`.
"""

from __future__ import annotations

import copyreg
import inspect
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...ops.linear_loss.linear_ce import linear_ce
from .deferred import Head, _Product, defer, is_deferred, linear_layers, returned, undefer

OP = "integrations.transformers.use_fused_loss"


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def check_head(model: Any, op: str) -> None:
    """ValueError for a model whose head is not a linear layer as torch has it."""
    layer = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or layer is None:
        checks.fail(op, "model", "a language model of transformers, such as LlamaForCausalLM", type(model).__name__)
    layer = layer()
    if not linear_layers(layer):  # an adapter around it would make its weight something else
        what = f"{type(layer).__name__} in {type(model).__name__}"
        checks.fail(op, "model", "with a plain nn.Linear as head", what)


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """The label of the token behind each position."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def loss_of(head: Head, hidden: Tensor, target: Tensor, ignore_index: int, count: Tensor | int | None) -> Tensor:
    """Mean over the targets, or their sum divided by ``count``."""
    loss = linear_ce(
        hidden, head.weight, target.to(hidden.device), bias=head.bias, temperature=head.temperature,
        softcap=head.softcap, ignore_index=ignore_index, denominator=count,
    )  # fmt: skip
    assert isinstance(loss, Tensor)  # not a pair: no other outputs were asked for
    return loss


def observed(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    ignore_index: int,
    count: Tensor | int | None,
    token_scaling: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_of`, and from the same pass each target's ``entropy`` and whether it is ``correct``, 0 where ignored."""
    loss, found = linear_ce(
        hidden, head.weight, target.to(hidden.device), bias=head.bias, temperature=head.temperature,
        softcap=head.softcap, ignore_index=ignore_index, denominator=count, token_scaling=token_scaling,
        outputs=("entropy", "correct"),
    )  # fmt: skip
    return loss, {name: value.detach() for name, value in found.items()}


@torch.no_grad()
def look(hidden: Tensor, head: Head, target: Tensor, rows: int = 1024) -> dict[str, Tensor]:
    """``entropy``, ``correct`` and ``mean_logit`` of each target that is not -100, elsewhere 0."""
    found = observed(head, hidden, target, -100, None)[1]
    if head.softcap is None:
        bias = 0.0 if head.bias is None else head.bias.float().mean()
        mean = (hidden.float() @ head.weight.mean(0, dtype=torch.float32) + bias) / head.temperature
        return {**found, "mean_logit": torch.where(target == -100, 0.0, mean)}
    mean = torch.zeros_like(found["entropy"])
    for block in (target != -100).nonzero().split(rows):  # a cap has no such sum: the logits of some rows at a time
        at = tuple(block.T)
        logits = nn.functional.linear(hidden[at], head.weight, head.bias).float()
        capped = head.softcap * (logits / head.softcap).tanh() / head.temperature
        mean[at] = capped.mean(1).to(mean.dtype)
    return {**found, "mean_logit": mean}


class FusedLoss:
    """What `use_fused_loss` returns: `remove`, or leaving its ``with`` block, gives the model its own class back."""

    def __init__(self, model: Any, applied: bool) -> None:
        self._model, self._applied = model, applied

    @property
    def status(self) -> str:
        """Of the model's last forward pass with labels: ``"fused"``, ``"materialised: <why>"``, or ``"not run"``."""
        status: str = self._model.__dict__.get(STATUS, "not run")
        return status

    def remove(self) -> None:
        """Undo; a second time is no error."""
        kind = type(self._model)
        if _Fused in kind.__mro__:
            self._model.__class__ = _without(kind)
        self._model.__dict__.pop(STATUS, None)

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        if self._applied:  # otherwise a block around this one will
            self.remove()


def use_fused_loss(model: Any) -> FusedLoss:
    """Make a causal language model compute its loss without the ``[B, S, V]`` logits, in place.

    The model's own forward runs, whatever its class; with ``labels``, its head yields deferred logits (see
    `DeferredLogits`), on which the scales, softcaps, casts and slices of the model are recorded, and the cross-entropy
    of them is `w2s_fast.linear_ce` of the hidden states: the same loss and gradients, in training and in evaluation,
    with ``shift_labels``, ``ignore_index``, ``num_items_in_batch`` of `Trainer` (gradient accumulation), tied
    embeddings, pruned, parametrized and frozen heads, autocast, auxiliary losses of a mixture of experts. If every
    label is ignored the loss is 0.

    What the head's logits are used for otherwise, by the model, a loss function of your own, or an adapter, makes them;
    so do forward and backward hooks on the head, and heads of tensor parallelism. The result is then the model's own
    and a warning says once why; `FusedLoss.status` tells it of every pass.

    In training mode ``logits`` of the output is None (in a tuple: the deferred ones). In evaluation they are made when
    they are looked at (of a model that FSDP2 shards they are the deferred ones). Without labels nothing changes. The
    model stays what it was for pickle, deepcopy, PEFT, DataParallel, DDP and FSDP2 (also with the head as a unit by
    itself: its weights are then gathered twice a forward pass).

    Args:
        model: a transformers model with a linear head, or a PEFT model around one.

    Returns:
        A handle with ``remove()`` and ``status``; also a context manager. A model that has the fused loss may be given
        again.

    Raises:
        ValueError: a model without a plain linear head (an adapter on it, a quantised one), a forward that was
            replaced.

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
    model = unwrap(model)
    check_head(model, OP)
    if _Fused in type(model).__mro__:
        return FusedLoss(model, False)
    if "forward" in model.__dict__:
        checks.fail(OP, "model", "with its class's own forward", "a forward that was replaced")
    kind: Any = type(model)
    model.__class__ = fused_class(kind)
    return FusedLoss(model, True)


STATUS = "_w2s_fast_loss"  # the entry of a model's __dict__


class _Fused:
    """Mark of the classes that `fused_class` makes."""


@cache
def fused_class(kind: Any) -> Any:
    """The class of models with the fused loss: of the same name, so that transformers takes it for the class it is."""
    own: Callable[..., Any] = kind.forward
    names = list(inspect.signature(own).parameters)[1:]

    @wraps(own)  # its signature too: `Trainer` and `generate` look there for the arguments that a model takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("labels") is None:
            return own(self, *args, **kwargs)
        requests, products = defer(self.get_output_embeddings()), []
        try:
            output = own(self, *args, **kwargs)
        finally:
            products = undefer(requests)
        if not torch.compiler.is_compiling():
            _note(self, products)
        keep = given.get("logits_to_keep", 0)
        asked = not self.training or isinstance(keep, Tensor) or keep != 0
        plain = torch.compiler.is_compiling() or getattr(self, "_is_replica", False)
        return _output(output, asked, plain, _sharded(type(self)))

    def reduce(self: Any, protocol: Any) -> Any:
        made = kind.__reduce_ex__(self, protocol)
        if made[0] is copyreg.__newobj__ and made[1] == (made_class,):  # type: ignore[attr-defined]
            return (_empty, (kind,), *made[2:])
        return made

    body: dict[str, Any] = {
        "forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__, "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }  # fmt: skip
    if isinstance(theirs := getattr(kind, "loss_function", None), property):
        body["loss_function"] = _loss_property(theirs.fget, theirs.fset)
    made_class = type(kind.__name__, (kind, _Fused), body)
    return made_class


def _loss_property(get: Any, put: Any) -> property:
    """A model's ``loss_function`` that takes deferred logits, if it is transformers' own."""

    def loss_function(self: Any) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        found = get(self)
        return causal_loss if found is ForCausalLMLoss else found

    return property(loss_function, put)


def _empty(kind: type) -> Any:
    """An object of the fused class without its attributes, which pickle and deepcopy fill in."""
    made = fused_class(kind)
    return made.__new__(made)


def _without(kind: type) -> type:
    """The class that was there before: below ours, and below a class that FSDP put on top."""
    if _Fused in kind.__bases__:
        return kind.__bases__[0]
    bases = tuple(_without(base) if _Fused in base.__mro__ else base for base in kind.__bases__)
    return type(kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})


def causal_loss(
    logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
    shift_labels: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """transformers' ``ForCausalLMLoss``, of deferred logits too."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    target = labels if shift_labels is None else shift_labels
    deferred = is_deferred(logits) and logits.pending and logits.shape[-1] == vocab_size
    if not deferred or target.shape != logits.shape[:-1] or target.dtype != torch.int64:
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    found = logits.through(lambda hidden, head: loss_of(head, hidden, target, ignore_index, num_items_in_batch))
    logits._product.reason = ""
    return found.float()


def _note(model: Any, products: list[_Product]) -> None:
    """Remember whether the loss was fused, and say once if it was not."""
    if any(not product.reason for product in products):
        status = "fused"
    elif products:
        status = f"materialised: {products[-1].reason}"
    else:
        status = "materialised: the head has hooks, an adapter, or was replaced"
    if status != "fused" and model.__dict__.get(STATUS) != status:
        text = f"w2s_fast.{OP}: the loss of this {type(model).__name__} is its own, with logits ({status})."
        warnings.warn(text, stacklevel=4)
    model.__dict__[STATUS] = status


def _sharded(kind: type) -> bool:
    """Whether FSDP2 has put its class on top of a model's."""
    return any(c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed") for c in kind.__mro__)


def _output(output: Any, asked: bool, plain: bool, walked: bool) -> Any:
    """The model's output without its logits, or with logits that are made when they are looked at.

    ``plain``: with tensors at once, where a program needs every entry (DataParallel's gather) or traces it.
    ``walked``: with `DeferredLogits`, where a program looks at every field and needs none (FSDP2).
    """
    if not isinstance(output, dict):
        return output
    found = {name: value for name, value in output.items() if is_deferred(value)}
    if not found:
        return output
    if not asked and all(logits.pending for logits in found.values()):
        return type(output)(**{name: value for name, value in output.items() if name not in found})
    if plain or not asked:  # the second: they were made anyway
        return type(output)(**{n: v.tensor() if n in found else v for n, v in output.items()})
    if walked:
        return output
    for name, logits in found.items():
        output[name] = returned(logits)
    output.__class__ = _lazy_class(type(output))
    return output


@cache
def _lazy_class(kind: Any) -> Any:
    """A class of outputs whose deferred logits are tensors to whoever looks at them; items stay deferred."""

    def attribute(self: Any, name: str) -> Any:
        value = super(made, self).__getattribute__(name)
        return value.tensor() if is_deferred(value) else value

    def item(self: Any, key: Any) -> Any:
        value = dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]
        if isinstance(value, tuple) and not isinstance(key, str):
            return tuple(v.tensor() if is_deferred(v) else v for v in value)
        return value.tensor() if is_deferred(value) else value

    def reduce(self: Any) -> Any:
        return kind(**{name: self[name] for name in self.keys()}).__reduce__()

    def post_init(self: Any) -> None:  # a copy that pytree makes, say for FSDP, looks at every field
        self.__class__ = kind
        kind.__post_init__(self)
        self.__class__ = made

    body = {
        "__getattribute__": attribute, "__getitem__": item, "__reduce__": reduce, "__post_init__": post_init,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__,
    }  # fmt: skip
    made: Any = type(kind.__name__, (kind,), body)
    return made
