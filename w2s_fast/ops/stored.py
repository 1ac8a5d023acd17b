"""Gradients that a loss made in its forward pass, as its backward hands them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..gradients import is_one

_is_several = torch._C._functorch.is_legacy_batchedtensor


def scaled(grad: Tensor | None, found: Sequence[Tensor]) -> list[Tensor]:
    """Saved gradients times the upstream gradient of the loss, which is usually 1: then as they are."""
    if grad is None:
        return [torch.zeros_like(g) for g in found]
    # a tracer's tensor is a subclass; several gradients at once (is_grads_batched) are no number
    plain = type(grad) is Tensor and checks.readable(grad) and not _is_several(grad)
    if plain and is_one(grad):
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # then they must outlive what the caller does
        return [g.clone() if again else g for g in found]
    # a number keeps its own dtype: a loss scale need not fit into float16
    return [g * grad if g.numel() else torch.empty_like(g) for g in found]
