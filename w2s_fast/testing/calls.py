"""Records the dispatcher calls of a piece of code and the addresses they read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """``with Calls() as calls: ...``; ``calls.seen`` is the list of (op, data pointers of its tensors)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pointers = [t.data_ptr() for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), pointers))
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[list[int]]:
        """Data pointers that each op of this package was given."""
        return [pointers for op, pointers in self.seen if op.startswith("w2s_fast.")]

    def copies(self, tensors: Sequence[Tensor]) -> list[str]:
        """Ops of a copying kind that read from the memory of one of ``tensors``."""
        words = ("copy", "clone", "contiguous", "_to")
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        return [
            op for op, pointers in self.seen
            if any(word in op for word in words) and any(low <= p < high for p in pointers for low, high in spans)
        ]
