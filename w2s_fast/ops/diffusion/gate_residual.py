"""gate_residual: x + gate y."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...calibration import or_plain
from ..output import copy_out
from .modulation import MODULATE, Vector, added, both_tokens, over_tokens, vector


def _plain(x: Tensor, y: Tensor, gate: Vector | None = None) -> Any:
    if gate is None:
        return x + y
    return NotImplemented if isinstance(gate, (tuple, list)) else added(x, over_tokens(gate), y)


@or_plain(_plain, replayed=True)
def gate_residual(x: Tensor, y: Tensor, gate: Vector | None = None, *, out: Tensor | None = None) -> Tensor:
    """``x + gate y``: the residual of an attention or an MLP, gated by the conditioning (arXiv 2212.09748).

    Args:
        x: ``(B, N, C)``; float32, bfloat16, float16 or float64; outer strides free.
        y: like x.
        gate: ``(B, C)``, ``(B, 1, C)``, ``(1, 1, C)``, or one a token, ``(B, N, C)`` or ``(1, N, C)``; or a pair (row
            ``(C,)``, such a tensor); None is 1.
        out: ``(B, N, C)`` to write to, may be x; no gradient then.

    Returns:
        ``(B, N, C)`` of the dtype of x. Differentiable, once, in every tensor argument; deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.gate_residual(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[0.5, 2.0]]))
        tensor([[[1.5000, 3.0000]]])
    """
    op = "gate_residual"
    given = x
    x, y = both_tokens(op, x, y)
    vectors = (None, None) if gate is None else vector(op, "gate", gate, x)
    found = MODULATE(x, y, *vectors, None, None, None, None, 0.0).added
    return copy_out(op, out, found, (given, y, *vectors))
