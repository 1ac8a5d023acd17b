"""This process among those that train together, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks

BUCKET = 32 << 20  # bytes of gradients that are sent together


class Place(NamedTuple):
    """This process among those that train together; alone: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device


ALONE = Place(0, 1, torch.device("cpu"))


def place(device: str | torch.device | None = None) -> Place:
    """From torchrun's environment; joins its process group once (nccl on CUDA, gloo otherwise).

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None or "auto" for CUDA where there is any. Under torchrun the CUDA device
            is the one of LOCAL_RANK.

    Raises:
        ValueError: a device that is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        checks.fail("methods.place", "device", "the name of a device", repr(device), str(error).split("\n")[0])
    if found.type == "cuda" and not torch.cuda.is_available():
        checks.fail("methods.place", "device", "one that torch finds here", repr(device))
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", found.index or 0)))
        torch.cuda.set_device(found)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return Place(int(os.environ.get("RANK", "0")), world, found)


def drawn(make: Callable[[int], Tensor], count: int, where: Place | None = None) -> Tensor:
    """Of the rows that ``make(n)`` draws for a batch of all processes, the ``count`` of this one.

    Every process draws them all, from generators of one seed, and takes what `ShuffledBatches` dealt to it: together
    they train as one process would.
    """
    rank, world = (0, 1) if where is None else where[:2]
    return make(count * world)[rank::world]


def generator(seed: int, where: Place | None = None) -> torch.Generator:
    """Of random numbers that the processes draw each for themselves, on the CPU."""
    return torch.Generator().manual_seed(seed if where is None else seed + 1_000_003 * where.rank)


def leave() -> None:
    """The process group that `place` joined, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait(where: Place) -> None:
    """For the other processes."""
    if where.world > 1:
        dist.barrier()


def averaged(value: Tensor, where: Place) -> Tensor:
    """The mean over the processes, without a gradient; ``value`` is overwritten."""
    value = value.detach()
    if where.world > 1:
        dist.all_reduce(value)
        value /= where.world
    return value


def mean(value: Tensor, where: Place) -> float:
    """`averaged`, a number."""
    return averaged(value, where).item()


def least(value: int, where: Place) -> int:
    """The smallest of the processes' numbers."""
    if where.world == 1:
        return value
    found = torch.tensor(value, device=where.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found.item())


def same_start(model: nn.Module, where: Place) -> None:
    """Give every process the parameters and buffers of rank 0."""
    if where.world > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(parameters: Iterable[nn.Parameter], where: Place) -> None:
    """What DistributedDataParallel does, after the backward pass and without a wrapper around the model.

    A parameter that has a gradient in some process gets one in all.
    """
    if where.world == 1:
        return
    found = [p for p in parameters if p.requires_grad]
    has = torch.tensor([p.grad is not None for p in found], dtype=torch.int32, device=where.device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for p, used in zip(found, has.tolist(), strict=True):
        if not used:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket = buckets.setdefault(p.grad.dtype, [])
        bucket.append(p.grad)
        if sum(g.nbytes for g in bucket) >= BUCKET:
            _average(buckets.pop(p.grad.dtype), where)
    for bucket in buckets.values():
        _average(bucket, where)


def _average(gradients: list[Tensor], where: Place) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= where.world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gathered(own: Tensor, where: Place) -> Tensor:
    """The rows of all processes, process by process, of which only the own ones carry a gradient.

    For losses that need the whole batch at once. The mean of the processes' gradients is taken, where such a loss needs
    their sum; so the own rows' gradient is multiplied by the number of processes.
    """
    if where.world == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(where.world)]
    dist.all_gather(parts, own.detach().contiguous())
    parts[where.rank] = own * where.world - own.detach() * (where.world - 1)
    return torch.cat(parts)
