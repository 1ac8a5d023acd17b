"""Classifiers of any kind: a module that returns logits, or a model of transformers whose output has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ... import checks
from .batches import sized
from .loop import moved


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """``[N, C]`` of ``model(inputs)``, or ``model(**inputs)`` for a mapping (without its ``labels``)."""
    if isinstance(inputs, Mapping):
        found = model(**{name: value for name, value in inputs.items() if name != "labels"})
    else:
        found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def inputs_of(item: Any) -> Any:
    """The inputs of an item or a batch: the mapping, the first of a tuple, or the thing itself."""
    return item[0] if isinstance(item, (tuple, list)) else item


def labels_of(item: Any) -> Any:
    """Its labels: the entry ``labels`` of a mapping, or the second of a tuple."""
    return item["labels"] if isinstance(item, Mapping) else item[1]


class WithTargets(Dataset[Any]):
    """Items of a map-style dataset, each with its row of some tensors: ``(item, row, ...)``."""

    def __init__(self, data: Any, *targets: Tensor) -> None:
        sized(data)
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return (self.data[i], *(target[i] for target in self.targets))


@torch.no_grad()
def predicted(model: nn.Module, data: Any, batch: int = 256) -> Tensor:
    """Logits ``[N, C]`` of a map-style dataset in its order, in evaluation mode, on the CPU."""
    sized(data)
    mode, device = model.training, next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    parts = [logits(model, moved(inputs_of(part), device)).float().cpu() for part in DataLoader(data, batch)]
    model.train(mode)
    return torch.cat(parts)


def labels(data: Any) -> Tensor:
    """``[N]`` of a map-style dataset."""
    return torch.tensor([int(labels_of(data[i])) for i in range(sized(data))])


def as_list(models: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """One or several models."""
    found: list[Any] = list(models) if isinstance(models, (list, tuple, nn.ModuleList)) else [models]
    for model in found:
        if not isinstance(model, nn.Module):
            checks.fail("methods", "teacher", "a torch module, or several", type(model).__name__, error=TypeError)
        model.eval().requires_grad_(False)
    return found
