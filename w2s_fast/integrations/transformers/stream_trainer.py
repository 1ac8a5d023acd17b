"""transformers' Trainer over a sampler of w2s_fast.data and a schedule of w2s_fast.optim."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ... import checks, files
from ...data import StreamBatchSampler, StreamSampler

OP = "integrations.transformers.StreamTrainer"
FILE = "stream.json"


class _KeepStream(TrainerCallback):  # type: ignore[misc]
    """Writes the sampler's state beside every checkpoint."""

    def __init__(self, stream: StreamSampler | StreamBatchSampler) -> None:
        self.stream = stream

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files.write_json(folder / FILE, self.stream.state_dict())


class StreamTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` with batches from a sampler of `w2s_fast.data` and the rate of a schedule of `w2s_fast.optim`.

    Runs under torchrun, with FSDP and gradient accumulation as Trainer does; a checkpoint resumes in the middle of an
    epoch with the batches and, for a `MixtureSampler`, the weight changes of the run that was interrupted.

    Args:
        stream: made with ``rank=0, world_size=1``, since Trainer deals out the batches to the processes itself. A
            sampler of batches has a process's batch, ``per_device_train_batch_size``.
        schedule: ``schedule(optimizer, steps)``; None for what ``args`` says.
        all others: `Trainer`'s.

    Raises:
        ValueError, TypeError: naming `stream`.
    """

    def __init__(
        self, *args: Any, stream: StreamSampler | StreamBatchSampler,
        schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        if not isinstance(stream, (StreamSampler, StreamBatchSampler)):
            checks.fail(OP, "stream", "a sampler of w2s_fast.data", type(stream).__name__, error=TypeError)
        if stream.world_size != 1:
            checks.fail(OP, "stream", "made with rank=0, world_size=1", f"world_size={stream.world_size}")
        super().__init__(*args, **more)
        batch = self.args.per_device_train_batch_size
        if isinstance(stream, StreamBatchSampler) and stream.batch_size != batch:
            checks.fail(OP, "stream", f"of batches of {batch}, per_device_train_batch_size", stream.batch_size)
        self.stream, self._schedule = stream, schedule
        self.add_callback(_KeepStream(stream))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader over the stream, prepared by accelerate."""
        args = self.args
        if isinstance(self.stream, StreamBatchSampler):
            how: dict[str, Any] = {"batch_sampler": self.stream}
        else:
            how = {
                "sampler": self.stream, "batch_size": args.per_device_train_batch_size,
                "drop_last": args.dataloader_drop_last,
            }  # fmt: skip
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, collate_fn=self.data_collator, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers, **how,
        )  # fmt: skip
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule over all updates."""
        if self._schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler: Any = self._schedule(optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / FILE
        if path.exists():
            # Trainer draws what lies before the checkpoint again and skips it: from the start, with the same changes
            self.stream.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
            self.stream.rewind()
