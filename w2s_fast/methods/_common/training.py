"""The training loop: schedule, checkpoint and resume, on one process or under torchrun."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import optim
from .cache import digest, read_checkpoint, write_checkpoint
from .models import windows


class Place(NamedTuple):
    """This process among those that train together; alone: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device


ALONE = Place(0, 1, torch.device("cpu"))


def place() -> Place:
    """From torchrun's environment; joins its process group once (nccl on CUDA, gloo on a CPU)."""
    world, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Place(int(os.environ.get("RANK", "0")), world, device)


class Watch(NamedTuple):
    """Where a training tells its losses, and the file and the key under which it is kept."""

    tick: Callable[[float], None] = lambda _: None
    path: Path | None = None
    key: str = ""


NOTHING = Watch()
Start = Callable[[str, int], Watch]


def watches(start: Callable[[str, int], Callable[[float], None]], out: Path, source: str) -> Start:
    """Progress bars of ``start``; checkpoints in ``out``, void once the file ``source`` or one beside it changes."""
    folders = (Path(source).parent, Path(__file__).parent)
    code = digest(*(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py"))))

    def watch(label: str, steps: int) -> Watch:
        name = re.sub(r"[^a-z0-9]+", "-", label.lower())
        key = digest(label, steps, torch.__version__, code)
        return Watch(start(label, steps), out / "checkpoints" / f"{name}.pt", key)

    return watch


def unwatched(label: str, steps: int) -> Watch:
    """No progress bar, no checkpoint."""
    return NOTHING


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """FSDP2: every layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine from 1 to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class Run(NamedTuple):
    """What a training run is made of; ``seed`` decides its batches, ``warmup`` is in steps."""

    steps: int
    warmup: int
    rate: float
    batch: int
    length: int
    optimizer: str
    seed: int


def batch_ids(ids: Tensor, run: Run, step: int, where: Place) -> Tensor:
    """This process's rows of a step's batch, a function of the seed and the step alone (so resuming needs no state)."""
    draw = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    return windows(ids, run.batch, run.length, draw)[where.rank :: where.world].to(where.device)


def leave() -> None:
    """The process group that `place` joined, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait(where: Place) -> None:
    """For the other processes."""
    if where.world > 1:
        dist.barrier()


def mean(value: Tensor, where: Place) -> float:
    """Over the processes."""
    if where.world > 1:
        dist.all_reduce(value)
        value /= where.world
    return value.item()


def gathered(own: Tensor, where: Place) -> Tensor:
    """The rows of all processes, process by process, of which only the own ones carry a gradient.

    For losses that need the whole batch at once. FSDP takes the mean of the processes' gradients, where such a loss
    needs their sum; so the own rows' gradient is multiplied by the number of processes.
    """
    if where.world == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(where.world)]
    dist.all_gather(parts, own.detach().contiguous())
    parts[where.rank] = own * where.world - own.detach() * (where.world - 1)
    return torch.cat(parts)


def train(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: Callable[[int], float], where: Place, *,
    optimizer: str = "adamw", decay: float = 0.0, checkpoint: Path | None = None, every: int = 0, key: str = "",
    also: Mapping[str, Any] | None = None, tick: Callable[[float], None] = lambda _: None,
) -> tuple[list[float], optim.Optimizer]:
    """Minimise ``loss(step)`` at the learning rate ``rate(step)``; the loss of every step, and the optimizer.

    Every ``every`` steps and at the end the state goes to ``checkpoint``. If that file exists and was written under the
    same ``key``, training goes on from it; the losses are those of a run that was never stopped, if ``loss`` depends on
    nothing but the model, the step and what ``also`` names: generators, and whatever has a ``state_dict``.
    """
    made = optim.make(optimizer, model.parameters(), decay)
    losses = load(checkpoint, key, model, made, where, also) if checkpoint else []
    for value in losses:
        tick(value)
    model.train()
    for step in range(len(losses), steps):
        made.begin(rate(step))
        found = loss(step)
        found.backward()
        made.finish()
        losses.append(mean(found.detach(), where))
        tick(losses[-1])
        if checkpoint and (len(losses) == steps or (every and len(losses) % every == 0)):
            save(checkpoint, key, model, made, losses, where, also)
    model.eval()
    return losses, made


def pretrain(
    model: nn.Module, ids: Tensor, run: Run, where: Place, *, checkpoint: Path | None = None, every: int = 0,
    key: str = "", tick: Callable[[float], None] = lambda _: None,
) -> tuple[list[float], optim.Optimizer]:
    """`train` on next-token prediction over random windows of ``ids``."""

    def loss(step: int) -> Tensor:
        rows = batch_ids(ids, run, step, where)
        value: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
        return value

    return train(model, loss, run.steps, lambda step: run.rate * cosine(step, run.steps, run.warmup), where,
                 optimizer=run.optimizer, checkpoint=checkpoint, every=every, key=key, tick=tick)  # fmt: skip


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, length: int, count: int, where: Place) -> float:
    """Over ``count`` windows of held-out text, evenly spread; every process looks at all of them."""
    starts = torch.linspace(0, len(ids) - length, count).long()
    rows = ids[starts[:, None] + torch.arange(length)].to(where.device)
    nats = [model(input_ids=part, labels=part, use_cache=False).loss.double() * len(part) for part in rows.split(16)]
    return math.exp(float(sum(nats)) / count)


def _own_file(path: Path, where: Place) -> Path:
    return path if where.world == 1 else path.with_suffix(f".{where.rank}-of-{where.world}{path.suffix}")


def save(
    path: Path, key: str, model: nn.Module, optimizer: optim.Optimizer, losses: list[float], where: Place,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint in one rename; under torchrun a file for every process."""
    write_checkpoint(
        _own_file(path, where),
        {
            "key": key, "losses": losses, "gradient_bytes": optimizer.gradient_bytes, "optimizer": optimizer.state(),
            "model": {name: optim.local(tensor) for name, tensor in model.state_dict().items()},
            "also": {
                name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                for name, part in (also or {}).items()
            },
        },
    )  # fmt: skip


def load(
    path: Path, key: str, model: nn.Module, optimizer: optim.Optimizer, where: Place,
    also: Mapping[str, Any] | None = None,
) -> list[float]:
    """Restore a checkpoint of the same ``key``; the losses up to it, none if there is no such file."""
    found = read_checkpoint(_own_file(path, where), key, where.device)
    if found is None:
        return []
    own = model.state_dict()
    model.load_state_dict({name: optim.sharded_like(t, own[name]) for name, t in found["model"].items()})
    optimizer.load(found["optimizer"])
    optimizer.gradient_bytes = found["gradient_bytes"]
    for name, part in (also or {}).items():
        state = found["also"][name]
        part.set_state(state.cpu()) if isinstance(part, torch.Generator) else part.load_state_dict(state)
    losses: list[float] = found["losses"]
    return losses
