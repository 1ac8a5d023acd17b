"""adaln_modulate: LayerNorm without parameters, then scale and shift from the conditioning, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ..output import copy_out
from .modulation import MODULATE, Vector, normed, tokens, vector


def _plain(x: Tensor, shift: Vector, scale: Vector, *, eps: float = 1e-6) -> Any:
    return NotImplemented if isinstance(shift, (tuple, list)) else normed(x, shift, scale, eps)


@or_plain(_plain, replayed=True)
def adaln_modulate(
    x: Tensor, shift: Vector, scale: Vector, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """``LN0(x) (1 + scale) + shift``, the adaptive LayerNorm of diffusion transformers (arXiv 2212.09748).

    LN0 is the LayerNorm over C without parameters. One pass; arithmetic in float32 (float64 for float64).

    Args:
        x: ``(B, N, C)``; float32, bfloat16, float16 or float64; outer strides free.
        shift: ``(B, C)``, ``(B, 1, C)``, ``(1, 1, C)``, or one a token, ``(B, N, C)`` or ``(1, N, C)``; or a pair (row
            ``(C,)``, such a tensor), added on the fly, so that a block's table and the shared embedding are never
            summed in memory.
        scale: the same.
        eps: added to the variance.
        out: ``(B, N, C)`` to write to; no gradient then.

    Returns:
        ``(B, N, C)`` of the dtype of x. Differentiable, once, in every tensor argument; deterministic. Keeps x and 2
        floats a token.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x = torch.tensor([[[-1., 1.]]])
        >>> w2s_fast.adaln_modulate(x, torch.full((1, 2), 3.0), torch.ones(1, 2), eps=0.0)
        tensor([[[1., 5.]]])
    """
    op = "adaln_modulate"
    x = tokens(op, "x", x)
    vectors = (*vector(op, "shift", shift, x), *vector(op, "scale", scale, x))
    found = MODULATE(x, None, None, None, *vectors, checks.number(op, "eps", eps, low=0.0)).h
    return copy_out(op, out, found, (x, *vectors))
