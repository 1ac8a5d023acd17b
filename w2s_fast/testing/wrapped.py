"""``python -m w2s_fast.testing.wrapped ddp|fsdp DIRECTORY``: gradients of bounds on two processes are those of one."""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn

from ..nn import bound


def work(rank: int, wrap: str, directory: str) -> None:
    """One of two processes."""
    distributed.init_process_group("gloo", init_method=f"file://{directory}/{wrap}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = bound(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    twin, x, y = copy.deepcopy(module), torch.randn(8, 6), torch.randint(0, 3, (8,))
    F.cross_entropy(twin(x, y=y, eps=0.1, method="crown-ibp"), y).backward()
    if wrap == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(module, mesh=init_device_mesh("cpu", (2,)))  # type: ignore[assignment]
    part = slice(4 * rank, 4 * rank + 4)
    F.cross_entropy(wrapped(x[part], y=y[part], eps=0.1, method="crown-ibp"), y[part]).backward()
    for ours, whole in zip(wrapped.parameters(), twin.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad  # type: ignore[union-attr]
        torch.testing.assert_close(grad, whole.grad)
    if wrap == "fsdp":
        for p in wrapped.parameters():
            p.grad = None
        try:
            bound(module.model).bounds(x, 0.1)
        except TypeError as error:
            assert "a sharded parameter" in str(error)
        else:
            raise AssertionError("bounds of parts of the parameters")


if __name__ == "__main__":
    multiprocessing.spawn(work, args=(sys.argv[1], sys.argv[2]), nprocs=2)  # type: ignore[no-untyped-call]
    print("same gradients")
