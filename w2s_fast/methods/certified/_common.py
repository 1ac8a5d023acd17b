"""What the certified methods share: small networks for the digits, their error and their verified error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn import bound

CLIP = (0.0, 1.0)  # what a pixel may be


def mlp(hidden: tuple[int, ...], seed: int, *, norm: bool = False) -> nn.Sequential:
    """Linear, batch-norm if asked, ReLU for each hidden width, then a Linear; PyTorch's initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        inputs = 64
        for width in hidden:
            layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, 10))


def convolutional(width: int, seed: int, *, norm: bool = False, hidden: int = 64) -> nn.Sequential:
    """CNN-7 of fast certified training (arXiv 2103.17268), narrow and for digits ``[N, 1, 8, 8]``: one stride of 2.

    Args:
        width: channels; twice as many from the third convolution on.
        norm: batch-norm after every convolution and after the hidden Linear.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inner, outer, stride in ((1, width, 1), (width, width, 1), (width, 2 * width, 2),
                                     (2 * width, 2 * width, 1), (2 * width, 2 * width, 1)):  # fmt: skip
            convolution = nn.Conv2d(inner, outer, 3, stride, 1)
            layers += [convolution, *([nn.BatchNorm2d(outer)] if norm else []), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(32 * width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, 10))


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples that the model in eval mode gets wrong."""
    return float((model.eval()(x).argmax(1) != y).double().mean())


def verified_error(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Share of samples without a certificate (sound in floating point) at radius eps, pixels within [0, 1]."""
    return 1 - float(bound(model.eval()).verified(x, y, eps, clip=CLIP).double().mean())
