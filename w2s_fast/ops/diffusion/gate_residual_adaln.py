"""gate_residual_adaln: the residual of one sub-block and the adaptive LayerNorm of the next, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from ...calibration import or_plain
from .modulation import MODULATE, Vector, added, both_tokens, normed, over_tokens, vector


def _plain(x: Tensor, y: Tensor, gate: Vector | None, shift: Vector, scale: Vector, *, eps: float = 1e-6) -> Any:
    if isinstance(gate, (tuple, list)) or isinstance(shift, (tuple, list)):
        return NotImplemented
    x = x + y if gate is None else added(x, over_tokens(gate), y)
    h = normed(x, shift, scale, eps)
    return NotImplemented if h is NotImplemented else (x, h)


@or_plain(_plain, replayed=True)
def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Vector | None, shift: Vector, scale: Vector, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``x_new = x + gate y`` and ``h = LN0(x_new) (1 + scale) + shift``, each row read once.

    Args:
        x: ``(B, N, C)``; float32, bfloat16, float16 or float64; outer strides free.
        y: like x.
        gate: as in `gate_residual`.
        shift: as in `adaln_modulate`.
        scale: as in `adaln_modulate`.
        eps: added to the variance.

    Returns:
        (x_new, h), each ``(B, N, C)`` of the dtype of x; h is made from the rounded x_new. Differentiable, once, in
        every tensor argument; deterministic. Keeps x_new, y and 2 floats a token.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, y, zero = torch.zeros(1, 1, 2), torch.tensor([[[-1., 1.]]]), torch.zeros(1, 2)
        >>> w2s_fast.gate_residual_adaln(x, y, None, zero, zero, eps=0.0)[1]
        tensor([[[-1.,  1.]]])
    """
    op = "gate_residual_adaln"
    x, y = both_tokens(op, x, y)
    gates = (None, None) if gate is None else vector(op, "gate", gate, x)
    vectors = (*gates, *vector(op, "shift", shift, x), *vector(op, "scale", scale, x))
    found, h, _ = MODULATE(x, y, *vectors, checks.number(op, "eps", eps, low=0.0))
    return found, h
