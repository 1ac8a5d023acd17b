"""Small networks for tests of bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def mlp() -> nn.Sequential:
    """Linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))


def convolutional() -> nn.Sequential:
    """Convolutions with batch-norm, one ReLU in place."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def residual() -> nn.Sequential:
    """A residual block, and pooling by averages."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Block(4), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip


def pooled() -> nn.Sequential:
    """Pooling by maxima."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


#: Networks by name, and the shape of an input.
MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, int, int]]] = {
    "mlp": (mlp, (3, 4, 4)), "conv": (convolutional, (3, 8, 8)), "residual": (residual, (3, 8, 8)),
    "pooled": (pooled, (3, 8, 8)),
}  # fmt: skip


def made(name: str, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network in training mode, whose batch-norms have uneven statistics; 7 inputs and their labels."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(-1.5, 1.5)  # of both signs: bounds change places
            module.bias.data.uniform_(-0.5, 0.5)
    return model, torch.rand(7, *shape), torch.arange(7) % 5
