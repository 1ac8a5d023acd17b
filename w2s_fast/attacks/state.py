"""A model held still while it is attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: A module, or any function of the input.
Model = Callable[..., Any]


def inner(model: Any) -> Any:
    """The module inside DistributedDataParallel: an attack reduces nothing, and processes may differ in passes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """``model`` in evaluation mode and without gradients of its parameters; afterwards as it was, also on an error.

    Batch-norm uses its running statistics and does not change them, dropout is off. A function that is no module is
    left alone.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in parameters:
            parameter.requires_grad_(True)


def outputs(model: Model, x: Tensor) -> Tensor:
    """``model(x)``, or the ``logits`` of a model of transformers."""
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]
