"""Hard batches (arXiv 2304.03486): rank all mini-batches by their loss, train on the hardest share of them.

Each epoch forwards every mini-batch without gradient and trains on the ``ceil(delta * batches)`` of the highest loss,
the hardest first (the paper's loop was not published; this is our reading). Compare at equal numbers of updates: what
is gained in "epochs" by training twice on hard batches is mostly the extra updates. `w2s_fast.metrics.select_topk` over
`per_sample_loss` chooses single samples instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...data import HardBatchSampler
from ._fit import Loss, classify, device_of, fit, moved


@torch.no_grad()
def rank_batches(
    model: nn.Module, dataset: Any, sampler: HardBatchSampler, loss: Loss = classify, **loader: Any
) -> None:
    """Give the sampler the loss of every batch of its epoch under the present model, which keeps its mode."""
    device = device_of(model)
    batches = DataLoader(dataset, batch_sampler=sampler.ranking(), **loader)
    losses = torch.stack([loss(model, moved(batch, device)).detach().float() for batch in batches])
    sampler.update_losses(range(len(losses)), losses)


def train_epoch(
    model: nn.Module, dataset: Any, sampler: HardBatchSampler, optimizer: torch.optim.Optimizer, epoch: int, *,
    loss: Loss = classify, scheduler: Any = None, **loader: Any,
) -> list[float]:  # fmt: skip
    """Rank the batches of an epoch, then train on the hardest; the losses. A ranking pass costs a forward of the data.

    With ``HardBatchSampler(reshuffle=False)`` only batches without a loss are worth ranking: call `rank_batches` once
    and hand the training losses to ``sampler.update_losses(sampler.chosen(), losses)`` instead.
    """
    sampler.set_epoch(epoch)
    rank_batches(model, dataset, sampler, loss, **loader)
    return fit(model, DataLoader(dataset, batch_sampler=sampler, **loader), optimizer, loss, scheduler=scheduler)
