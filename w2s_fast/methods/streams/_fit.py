"""One pass over batches: what the methods of this family share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset

#: ``loss(model, batch)``, a scalar.
Loss = Callable[[nn.Module, Any], Tensor]


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of ``(x, y)``."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(part, device) for part in batch)
    return batch


def loader(dataset: Any, batch_size: int, sampler: Any) -> DataLoader[Any]:
    """A DataLoader; of tensors, or a part of them, it takes a batch by one index and collates nothing: same batches."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    if type(whole) is TensorDataset:
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, batch_size, drop_last=False))
    return DataLoader(dataset, batch_size, sampler=sampler)


def fit(
    model: nn.Module, batches: Iterable[Any], optimizer: torch.optim.Optimizer, loss: Loss = classify, *,
    scheduler: Any = None, clip: float | None = None,
) -> list[float]:  # fmt: skip
    """An update a batch; the losses. ``scheduler`` steps after every update, ``clip`` bounds the gradient's norm."""
    found, device = [], device_of(model)
    for batch in batches:
        value = loss(model, moved(batch, device))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(value.detach())
    return [float(value) for value in found]


@torch.no_grad()
def losses_of(
    model: nn.Module, dataset: Any, batch_size: int, per_sample: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """``per_sample(model, batch)`` over a dataset in its order, on the CPU; in evaluation mode."""
    training, device = model.training, device_of(model)
    model.eval()
    parts = [per_sample(model, moved(batch, device)).cpu() for batch in DataLoader(dataset, batch_size)]
    model.train(training)
    return torch.cat(parts)


def classification_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of every ``(x, y)``."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")
