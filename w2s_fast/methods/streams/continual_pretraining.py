"""Continual pre-training (arXiv 2403.08763): re-warm, re-decay, and replay a fixed share of the old data.

From a checkpoint: the learning rate rises linearly to its peak over 1 % of the steps, falls by a cosine to a tenth over
the new data, and every batch holds ``round(f B)`` old samples (f 5 % for a weak shift, 25 % for a strong one), within
the same token budget. Or an infinite schedule: data set after data set at a constant rate, annealing copies only.

`continue_training` is for any model and loop, `trainer` is transformers' Trainer, and

    w2s-fast train continual_pretraining --model DIR --old old.jsonl --new new.jsonl --replay 0.25 --out DIR

runs it on the user's own model and text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from ... import checks
from ...data import ReplayMixtureBatchSampler
from ...optim import InfiniteLR, RewarmCosineLR
from .._common import console
from ._fit import Loss, classify, fit

#: ``schedule(optimizer, steps)`` makes a scheduler.
Schedule = Callable[[torch.optim.Optimizer, int], Any]


def rewarm(max_lr: float | None = None, *, warmup: float = 0.01, min_ratio: float = 0.1) -> Schedule:
    """`RewarmCosineLR` over a phase, ``warmup`` a share of its steps."""
    return lambda optimizer, steps: RewarmCosineLR(
        optimizer, warmup=round(warmup * steps), total=steps, max_lr=max_lr, min_ratio=min_ratio
    )


def infinite(max_lr: float | None = None, *, warmup: float = 0.01, cooldown: float = 0.25, **more: Any) -> Schedule:
    """`InfiniteLR`, warm-up and cool-down as shares of the first phase's steps; keep it for the phases behind."""
    return lambda optimizer, steps: InfiniteLR(
        optimizer, warmup=round(warmup * steps), cooldown=round(cooldown * steps), max_lr=max_lr, **more
    )


def continue_training(
    model: nn.Module, new: Any, old: Any, optimizer: torch.optim.Optimizer, *, replay: float, batch_size: int,
    epochs: int = 1, schedule: Schedule | None = None, loss: Loss = classify, clip: float | None = 1.0, seed: int = 0,
    rank: int | None = None, world_size: int | None = None, **loader: Any,
) -> list[float]:  # fmt: skip
    """Train on ``new`` with a share ``replay`` of ``old`` in every batch; the loss of every step.

    Args:
        model, optimizer: the user's, from a checkpoint; batches are moved to the model's device.
        new, old: map-style datasets.
        replay: share of old samples in [0, 1).
        batch_size: of all ranks together.
        epochs: over ``new``.
        schedule: default `rewarm()`: the groups' own initial rates are the peak. Give ``rewarm(max_lr)`` for an
            optimizer that has been decayed.
        clip: norm of the gradient, None for none.
        seed, rank, world_size: see `ReplayMixtureBatchSampler`.
    """
    sampler = ReplayMixtureBatchSampler(
        len(new), len(old), replay, batch_size, seed=seed, rank=rank, world_size=world_size
    )
    batches: DataLoader[Any] = DataLoader(ConcatDataset([new, old]), batch_sampler=sampler, **loader)
    scheduler = (schedule or rewarm())(optimizer, epochs * len(sampler))
    found: list[float] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += fit(model, batches, optimizer, loss, scheduler=scheduler, clip=clip)
    return found


def trainer(model: Any, new: Any, old: Any, args: Any, *, replay: float, schedule: Schedule | None = None) -> Any:
    """transformers' Trainer on ``new`` and ``old`` (datasets of token blocks) with exact replay in every batch.

    ``args`` are the user's ``TrainingArguments``: batch size, epochs, precision, FSDP, checkpoints, ``learning_rate``
    (the peak). The replay share holds in each process's batch. Checkpoints resume in the middle of an epoch.
    """
    with checks.extra("streams"):
        from datasets import concatenate_datasets

    from ...integrations.transformers.stream_trainer import StreamTrainer

    sampler = ReplayMixtureBatchSampler(
        len(new), len(old), replay, args.per_device_train_batch_size, seed=args.seed, rank=0, world_size=1
    )
    return StreamTrainer(model, args, train_dataset=concatenate_datasets([new, old]), stream=sampler,
                         schedule=schedule or rewarm())  # fmt: skip


def replay_stream(new: int, old: int, given: Any) -> Callable[[int, int], ReplayMixtureBatchSampler]:
    """The commands' sampler, of any number of processes."""
    return lambda rank, world: ReplayMixtureBatchSampler(
        new, old, given.replay, given.batch * world, seed=given.seed, rank=rank, world_size=world
    )


def main(arguments: list[str]) -> int:
    """`w2s-fast train continual_pretraining --model ... --old ... --new ... --replay 0.25 --out ...`."""
    from . import _language

    parser = console.parser("continual_pretraining", __doc__)
    _language.options(parser)
    parser.add_argument("--new", type=Path, required=True, help="text to learn: .txt, .jsonl or .parquet (column text)")
    parser.add_argument("--old", type=Path, required=True, help="text of the kind that the model has learned")
    parser.add_argument("--replay", type=float, default=0.25, help="share of old text in every batch (default 0.25)")
    parser.add_argument("--schedule", choices=("rewarm", "infinite"), default="rewarm")
    given = parser.parse_args(arguments)
    model, tokenizer = _language.model_of(given)
    new, old = (_language.blocks(path, tokenizer, given.length) for path in (given.new, given.old))
    schedule = rewarm() if given.schedule == "rewarm" else infinite()
    stream = replay_stream(len(new), len(old), given)
    return _language.train(model, tokenizer, given, {"new": new, "old": old}, stream, schedule)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
