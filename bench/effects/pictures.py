"""Digits as pictures, seeded distortions of them, and small convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe, train

from .data import Split


def network(width: int, seed: int, side: int = 8) -> nn.Sequential:
    """Two convolutions and a Linear for pictures ``[N, 1, side, side]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * (side // 2) ** 2, 10),
        )  # fmt: skip


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures ``[N, 1, 8, 8]``, each moved by up to one pixel in either direction."""
    padded = F.pad(x[:, 0], (1, 1, 1, 1))
    rows, columns = (torch.randint(3, (len(x), 1), generator=generator) + torch.arange(8) for _ in range(2))
    return padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def distorted(split: Split, copies: int, seed: int) -> Split:
    """``copies`` of every picture, moved by up to a pixel, turned by up to 15 degrees, with noise: ``[N, 1, 8, 8]``."""
    draw = torch.Generator().manual_seed(seed)
    x, y = split.x.view(-1, 1, 8, 8).repeat(copies, 1, 1, 1), split.y.repeat(copies)
    angle = (torch.rand(len(x), generator=draw) - 0.5) * 0.52
    shift = (torch.rand(len(x), 2, generator=draw) - 0.5) * 0.5
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin(), shift[:, 0]), 1),
                        torch.stack((angle.sin(), angle.cos(), shift[:, 1]), 1)), 1)  # fmt: skip
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    made = F.grid_sample(x, grid, align_corners=False) + 0.1 * torch.randn(x.shape, generator=draw)
    return Split(made.clamp(0, 1), y)


def taught(model: nn.Module, split: Split, recipe: Recipe, *, moved: bool = True) -> nn.Module:
    """On the labels of pictures ``[N, 1, 8, 8]``, in place; returns the model in evaluation mode."""
    from w2s_fast.methods._common.batches import shuffled

    draw = torch.Generator().manual_seed(recipe.seed)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(model(jitter(batch[0], draw) if moved else batch[0]), batch[1])

    train(model, loss, shuffled(TensorDataset(*split), recipe.batch, seed=recipe.seed), recipe)
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, split: Split) -> float:
    """Percent of samples that the model gets wrong."""
    return 100 * float((model.eval()(split.x).argmax(1) != split.y).double().mean())
