"""A training that tests kill and start again: ``python -m w2s_fast.testing.stream_worker KIND FOLDER STEPS``.

RANK and WORLD_SIZE come from the environment, the processes meet in a file of FOLDER (gloo). Rank 0 writes a checkpoint
and the losses after every step; all ranks start from it. KIND is ``replay`` (paper 12: re-warmed rate, exact replay) or
``skills`` (paper 67: a mixture that follows the losses).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .. import files
from ..data import MixtureSampler, ReplayMixtureBatchSampler
from ..methods.streams.skill_it import SkillIt
from ..metrics import segment_mean
from ..optim import RewarmCosineLR

ITEMS, BATCH, EVERY = 60, 12, 4


def _data() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3 * ITEMS, 8, generator=draw, dtype=torch.float64)
    group = torch.arange(3).repeat_interleave(ITEMS)
    y = (x[:, 0] * x[:, 1] > 0).long() ^ (group == 1)
    return TensorDataset(torch.cat((x, nn.functional.one_hot(group, 3)), 1), y.long())


def _mean_gradients(model: nn.Module, world: int) -> None:
    for p in model.parameters():
        if world > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world


def run(kind: str, folder: Path, steps: int, rank: int = 0, world: int = 1) -> list[float]:
    """Train up to ``steps``, from the checkpoint in ``folder`` if there is one; the losses of the whole run."""
    if world > 1:
        meeting = folder / os.environ["MEETING"]
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    data = _data()
    model = nn.Sequential(nn.Linear(11, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = RewarmCosineLR(optimizer, warmup=3, total=steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if kind == "replay":
        batches: Any = ReplayMixtureBatchSampler(2 * ITEMS, ITEMS, 0.25, BATCH, rank=rank, world_size=world)
        loader: DataLoader[Any] = DataLoader(data, batch_sampler=batches)
    else:
        batches = MixtureSampler([ITEMS] * 3, num_samples=BATCH * 10, rank=rank, world_size=world,
                                 batch_size=BATCH // world)  # fmt: skip
        parts["skills"] = SkillIt(batches, torch.eye(3) + 0.3, 0.5)
        loader = DataLoader(data, BATCH // world, sampler=batches)
    parts["sampler"] = batches
    losses: list[float] = []
    kept = folder / "checkpoint.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        losses = state.pop("losses")
        for name, value in state.items():
            parts[name].load_state_dict(value)
    while len(losses) < steps:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            _mean_gradients(model, world)
            optimizer.step()
            schedule.step()
            found = loss.detach().clone()
            if world > 1:
                dist.all_reduce(found)
            losses.append(found.item() / world)
            if "skills" in parts and len(losses) % EVERY == 0:
                with torch.no_grad():
                    each = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1], reduction="none")
                parts["skills"].update(segment_mean(each, data.tensors[0][:, 8:].argmax(1), 3).mean)
            if rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                files.write_tensors(kept, {**state, "losses": losses})
                files.write_json(folder / "losses.json", losses)
            if len(losses) == steps:
                break
        else:
            batches.set_epoch(batches.epoch + 1)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
