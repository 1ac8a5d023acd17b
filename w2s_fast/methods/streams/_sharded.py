"""The commands under torchrun with FSDP2: a decoder layer a unit, the head with the rest, so that the loss stays fused.

Trainer under accelerate makes the head a unit of its own, which keeps the fused loss from its weights; hence a loop of
our own. Checkpoints are those of torch.distributed.checkpoint, and any number of processes may go on from one.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import DataLoader

from ...data import StreamBatchSampler
from .._common import loop
from .._common import place as places
from ._fit import moved
from ._told import Schedule, Stream, some, tell

KEPT = 2  # checkpoints


class Run:
    """Model, optimizer, schedule and stream of a training, and its losses so far."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any, stream: Any) -> None:
        self.model, self.optimizer, self.losses = model, optimizer, list[float]()
        self.others = {"schedule": scheduler, "stream": stream}

    def state(self) -> dict[str, Any]:
        """Shards and plain values, as torch.distributed.checkpoint takes them."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        others = {name: part.state_dict() for name, part in self.others.items()}
        return {"model": model, "optimizer": optimizer, "others": Kept({**others, "losses": self.losses})}

    def save(self, out: Path, where: places.Place) -> None:
        """Into ``out``; the oldest are deleted."""
        dcp.save(self.state(), checkpoint_id=out / f"checkpoint-{len(self.losses)}")
        if where.rank == 0:
            for old in checkpoints(out)[:-KEPT]:
                shutil.rmtree(old)

    def load(self, path: Path) -> None:
        """From a checkpoint."""
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])  # fmt: skip
        kept = state["others"].value
        for name, part in self.others.items():
            part.load_state_dict(kept[name])
        self.losses = kept["losses"]


class Kept:
    """Plain values as one entry of a checkpoint, whatever shape they have on loading."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """One entry."""
        return {"value": [self.value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The value that was saved."""
        (self.value,) = state["value"]


def checkpoints(out: Path) -> list[Path]:
    """Those that were finished, the oldest first."""
    return sorted((p.parent for p in out.glob("checkpoint-*/.metadata")), key=lambda p: int(p.name.split("-")[1]))


@torch.no_grad()
def losses(model: nn.Module, parts: Mapping[str, Any], batch: int, where: places.Place) -> dict[str, float]:
    """Mean loss a token of each part; every process computes the same."""
    found = {}
    model.eval()
    for name, part in parts.items():
        rows = torch.tensor(some(part)["input_ids"], device=where.device)
        sums = [model(input_ids=r, labels=r, use_cache=False).loss.double() * len(r) for r in rows.split(batch)]
        found[name] = float(sum(sums)) / len(rows)
    model.train()
    return found


def train(
    model: Any, tokenizer: Any, given: argparse.Namespace, parts: Mapping[str, Any], data: Any, stream: Stream,
    schedule: Schedule,
) -> int:  # fmt: skip
    """As `_language.train`, sharded over the processes of torchrun."""
    from transformers import AutoModelForCausalLM, default_data_collator

    if "RANK" not in os.environ:
        raise OSError("--fsdp: start it with torchrun, as in torchrun --nproc-per-node 8 -m w2s_fast.cli train ...")
    where = places.place()
    try:
        sampler = stream(where.rank, where.world)
        how: dict[str, Any] = {"sampler": sampler, "batch_size": given.batch}
        if isinstance(sampler, StreamBatchSampler):
            how = {"batch_sampler": sampler}
        loader: DataLoader[Any] = DataLoader(data, collate_fn=default_data_collator, **how)
        steps = given.steps if given.steps > 0 else max(1, round(given.epochs * len(loader) / given.accumulate))
        model.to(where.device)
        loop.shard(model)
        decays: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(decays, lr=given.lr, betas=(0.9, 0.95))
        run = Run(model, optimizer, schedule(optimizer, steps), sampler)
        found = checkpoints(given.out) if given.resume else []
        before = None if found else losses(model, parts, given.batch, where)
        if found:
            run.load(found[-1])
        _updates(run, loader, sampler, steps, given, where)
        after = losses(model, parts, given.batch, where)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if where.rank == 0:
            made = AutoModelForCausalLM.from_config(model.config)  # FSDP2 and the fused loss changed the model's class
            made.load_state_dict(whole)
            made.save_pretrained(given.out)
            tell(tokenizer, given, steps, before, after)
        places.wait(where)
    finally:
        places.leave()
    return 0


def _updates(run: Run, loader: Any, sampler: Any, steps: int, given: argparse.Namespace, where: places.Place) -> None:
    model, parts = run.model, list[torch.Tensor]()
    model.train()
    while len(run.losses) < steps:
        for batch in loader:
            with torch.autocast(where.device.type, torch.bfloat16, enabled=given.bf16):
                loss = model(**moved(batch, where.device), use_cache=False).loss
            (loss / given.accumulate).backward()
            parts.append(loss.detach())
            if len(parts) < given.accumulate:
                continue
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.others["schedule"].step()
            run.losses.append(places.mean(torch.stack(parts).mean(), where))
            parts.clear()
            if len(run.losses) % given.save_every == 0 or len(run.losses) == steps:
                run.save(given.out, where)
            if len(run.losses) == steps:
                return
        sampler.set_epoch(sampler.epoch + 1)
