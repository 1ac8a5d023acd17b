"""Products of whole matrices by the library: float32 sums of operands of any dtype, added to what is there.

    out = beta out + alpha a b

Logits of one model come from here: a tile of ours reads 1 byte from L2 for 43 to 64 FLOPs, the library's reads it for
twice as many or more. Several models, or weights a row, are fused in our tile (tile.py), which also serves where
``torch.use_deterministic_algorithms(True)`` is set. dW of a chunk of rows is added to the float32 sum of the others
inside the product, not rounded and added afterwards.
"""

from __future__ import annotations

import sys
from typing import Any

from ..common import Meta


def accumulate(out: Any, a: Any, b: Any, alpha: float = 1.0, beta: float = 1.0) -> None:
    """out = beta out + alpha a b for a float32 ``out [M, N]``; a ``[M, K]`` and b ``[K, N]`` share a dtype.

    With beta 0 ``out`` may hold anything.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif a.device.type == "cpu":  # the interpreter's: a CPU has no product of mixed dtypes
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)
    else:
        addmm = sys.modules["torch"].addmm  # loaded, as there is a tensor
        addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)


def serves(model: Any) -> bool:
    """Whether the library makes the logits of these models."""
    hidden, head = model.hiddens[0], model.heads[0]
    if len(model.hiddens) > 1 or model.weights is not None or isinstance(hidden, Meta) or hidden.dtype != head.dtype:
        return False
    return not sys.modules["torch"].are_deterministic_algorithms_enabled()


def logits_of(hidden: Any, head: Any, bias: Any, scale: float, out: Any) -> None:
    """out = scale (hidden head^T + bias), float32 ``[rows, V]``."""
    if bias is not None:
        out.copy_(bias.float() * scale)  # to every row
    accumulate(out, hidden, head.t(), scale, 0.0 if bias is None else 1.0)
