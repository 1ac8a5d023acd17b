"""Parameters that FSDP2 shards by rows: this process's part, sums over parts, tensors that are sharded alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered; any other tensor itself."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


class Rows:
    """How the rows of a sharded parameter lie; RuntimeError where it is sharded otherwise."""

    def __init__(self, op: str, parameter: Any) -> None:
        self.mesh, self.placements = parameter.device_mesh, tuple(parameter.placements)
        if not all(placed.is_replicate() or placed.is_shard(0) for placed in self.placements):
            checks.fail(op, "a projected parameter", "whole or sharded by rows", f"one placed {self.placements}",
                        error=RuntimeError)  # fmt: skip
        self.groups = [self.mesh.get_group(i) for i, placed in enumerate(self.placements) if placed.is_shard(0)]

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes that hold parts."""
        found = part.clone(memory_format=torch.contiguous_format)
        for group in self.groups:
            torch.distributed.all_reduce(found, group=group)
        return found

    def cut(self, tensor: Tensor) -> Tensor:
        """A whole tensor sharded like the parameter, as the first process has it."""
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.contiguous(), self.mesh, self.placements)

    def same(self, tensor: Tensor) -> Tensor:
        """A whole tensor as the first process has it."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        return local(distribute_tensor(tensor.contiguous(), self.mesh, [Replicate()] * len(self.placements)))

    def joined(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        """This process's rows as a tensor of the whole shape ``[m, r]``, sharded like the parameter."""
        from torch.distributed.tensor import DTensor

        size = torch.Size(shape)
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=size, stride=(size[1], 1)
        )  # fmt: skip
