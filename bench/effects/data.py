"""Data of the experiments with fixed train, dev and test parts."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from w2s_fast import checks

TEST, DEV = 360, 360


class Split(NamedTuple):
    """Pictures ``[N, 64]`` in [0, 1] and labels ``[N]``."""

    x: Tensor
    y: Tensor


def digits(seed: int) -> dict[str, Split]:
    """scikit-learn's digits: the same 360 test pictures always, the others 1077 train and 360 dev, shuffled by seed."""
    with checks.extra("demo"):
        from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest = order[TEST:][torch.randperm(len(order) - TEST, generator=torch.Generator().manual_seed(1 + seed))]
    x, y = torch.from_numpy(pictures).float() / 16, torch.from_numpy(labels).long()
    places = {"test": order[:TEST], "dev": rest[:DEV], "train": rest[DEV:]}
    return {name: Split(x[where], y[where]) for name, where in places.items()}


def mlp(*widths: int, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them, PyTorch's initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right answers."""
    return (model(split.x).argmax(1) == split.y).float().mean().item()


def cnn7(width: int, seed: int, *, norm: bool = False, hidden: int = 64) -> nn.Sequential:
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
