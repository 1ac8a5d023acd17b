"""Two gloo processes of a test, and what they must find: what one process finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn


def in_two(work: Callable[..., None], folder: Path, alone: Callable[[], Any] | None = None) -> None:
    """``work(rank)``, a function of a module, in both of two processes that are a group; both must come to its end.

    Args:
        alone: called in each before they are a group; the call is then ``work(rank, alone())``.
    """
    done = folder / "done"
    done.mkdir()
    mp.spawn(_start, args=(work, str(folder), alone), nprocs=2)  # type: ignore[no-untyped-call]
    assert sorted(path.name for path in done.iterdir()) == ["0", "1"]


def _start(rank: int, work: Callable[..., None], folder: str, alone: Callable[[], Any] | None) -> None:
    torch.set_num_threads(1)
    given = () if alone is None else (alone(),)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        work(rank, *given)
        Path(folder, "done", str(rank)).touch()
    finally:
        dist.destroy_process_group()


def assert_as_one(
    loss: Tensor, model: nn.Module, alone: Tensor, whole: nn.Module, *, loss_within: tuple[float, float],
    within: tuple[float, float], what: str = "",
) -> None:  # fmt: skip
    """The mean over both processes of the loss and of the gradients of ``model``, as DDP takes it, is that of one.

    Args:
        alone, whole: the loss of one process with the whole batch, and its model.
        loss_within, within: relative and absolute tolerance of the loss, of the gradients.
    """
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    _close(mean / 2, alone.detach(), loss_within, what)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert p.grad is not None, name
        dist.all_reduce(p.grad)
        _close(p.grad / 2, q.grad, within, f"{what} {name}")


def _close(found: Any, wanted: Any, within: tuple[float, float], what: str) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=within[0], atol=within[1], msg=lambda text: f"{what}: {text}"
    )
