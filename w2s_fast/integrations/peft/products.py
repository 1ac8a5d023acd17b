"""Which products are ours: those that a CPU makes faster than its library does."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ... import autocast, extension
from ...library import OPS
from ...ops.adapters.lora_linear import lora_linear

#: Rows from which `lora_linear` wins, by bytes of an element. One float32 row reads the weight, as the library does.
ROWS = {4: 2, 8: 2, 2: 1}


def served(rows: Tensor, *operands: Tensor) -> bool:
    """Whether `lora_linear` takes these rows: `servable`, and enough of them."""
    if not servable(rows, *operands):
        return False
    dtype = autocast.dtype_of(rows.device) or rows.dtype
    return bool(math.prod(rows.shape[:-1]) >= ROWS[dtype.itemsize])


def servable(rows: Tensor, *operands: Tensor) -> bool:
    """Whether `lora_linear` could take these rows: on a CPU, of plain tensors, with the compiled kernel."""
    if rows.device.type != "cpu" or extension.ERROR is not None or not OPS["lora_linear"].has_cpp():
        return False
    if any(type(t) not in (Tensor, nn.Parameter) for t in operands):
        return False  # sharded, quantised
    return autocast.dtype_of(rows.device) is not None or operands[0].dtype == rows.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with our product."""
    (outside, inside), none = weight.shape, weight.new_empty(0)
    return lora_linear(x, weight, none.view(0, inside), none.view(outside, 0), bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` where it is served, otherwise ``F.linear``."""
    return linear(x, weight, bias) if served(x, weight) else F.linear(x, weight, bias)
