"""A look at the values of a tensor on a CPU, in less time than one operator takes (csrc/values.cpp, where it is built).

For plain ways, which look at what they are given before they serve a call: a reduction and its ``item()`` would cost a
small one a tenth of its time.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

#: elements up to which PyTorch's operators run on one thread (at::internal::GRAIN_SIZE), so that they lie in its cache
_SMALL = 1 << 15


def _module() -> Any:
    try:
        found = importlib.import_module(f"{__package__}._C")
    except ImportError:  # operators do the same
        return None
    return found if hasattr(found, "finite") else None  # of an older build


_LOOK = _module()


def all_finite(t: Tensor) -> bool:
    """Whether all are finite; of many elements, whether their sum is, which says less only where that overflows."""
    if _LOOK is not None and type(t) is Tensor and t.is_cpu and t.is_contiguous() and t.numel() <= _SMALL:
        if t.dtype is torch.float32:
            return bool(_LOOK.finite(t.data_ptr(), t.numel(), 4))
        if t.dtype is torch.float64:
            return bool(_LOOK.finite(t.data_ptr(), t.numel(), 8))
    return math.isfinite(t.detach().sum().item())  # of values without their history: the sum is nobody's result


def all_inside(index: Tensor, size: int) -> bool:
    """Whether all of a tensor of integers lie in ``[0, size)``."""
    if _LOOK is not None and type(index) is Tensor and index.is_cpu and index.is_contiguous():
        if index.dtype is torch.int64:
            return bool(_LOOK.inside(index.data_ptr(), index.numel(), 8, size))
        if index.dtype is torch.int32:
            return bool(_LOOK.inside(index.data_ptr(), index.numel(), 4, size))
    if not index.numel():
        return True
    low, high = index.aminmax()
    return int(low) >= 0 and int(high) < size
