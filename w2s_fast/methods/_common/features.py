"""Features of any classifier: what goes into its last Linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ... import checks
from ...attacks import Stacked
from .classify import inputs_of, labels_of, logits
from .loop import moved


class Output(NamedTuple):
    """Features ``[N, D]`` and logits ``[N, C]``; of stacked models ``[S, N, D]`` and ``[S, N, C]``."""

    features: Tensor
    logits: Tensor


def last_linear(model: nn.Module) -> nn.Linear:
    """The head of a classifier: the last Linear of its modules.

    Raises:
        ValueError: a model without one.
    """
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        checks.fail("methods.last_linear", "model", "a classifier with a Linear layer as head", type(model).__name__)
    return found[-1]


def outputs(model: nn.Module, inputs: Any) -> Output:
    """Features and logits of one forward pass; a hook on the head sees what goes into it.

    Args:
        model: a classifier, or `w2s_fast.attacks.Stacked` ones with inputs ``[S, N, *]``.

    Raises:
        ValueError: features that are not a vector a sample, or a head that is not called.
    """
    if isinstance(model, Stacked):
        return Output(*model.call(outputs, inputs))
    seen: list[Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        made = logits(model, inputs)
    finally:
        handle.remove()
    if not seen or seen[-1].ndim != 2:
        got = f"features {tuple(seen[-1].shape)}" if seen else "one that is not called"
        checks.fail("methods.outputs", "model", "a classifier whose last Linear is its head, of features [N, D]", got)
    return Output(seen[-1], made)


class Body(nn.Module):
    """A classifier as the encoder of its features; it shares the parameters, those of the head too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        """``[N, D]``."""
        return outputs(self.model, inputs).features


@torch.no_grad()
def collected(body: nn.Module, data: Any, batch: int = 256) -> tuple[Tensor, Tensor]:
    """What ``body`` makes of a map-style dataset, ``[N, D]``, and the labels; in evaluation mode, on the CPU."""
    mode, device = body.training, next((p.device for p in body.parameters()), torch.device("cpu"))
    body.eval()
    rows, y = [], []
    for part in DataLoader(data, batch):
        rows.append(logits(body, moved(inputs_of(part), device)).float().cpu())
        y.append(torch.as_tensor(labels_of(part)).long())
    body.train(mode)
    return torch.cat(rows), torch.cat(y)
