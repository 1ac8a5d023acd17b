"""dispersion: variance and entropy of the softmax of rows, scaled to [0, 1]; one read of the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.mixture import dispersion as reference
from ...reference.numerics import accumulate_dtype

DISPERSION_BACKWARD = define(
    reference.dispersion_backward, fake=lambda grad, logits: logits.new_empty(logits.shape), triton=Kernel()
)


def _backward(call: Call, grad: Tensor) -> dict[str, Any]:
    return {"logits": DISPERSION_BACKWARD.on(call.backend)(grad.contiguous(), call.logits)}


DISPERSION = define(
    reference.dispersion,
    fake=lambda logits: logits.new_empty((logits.shape[0], 2), dtype=accumulate_dtype(logits)),
    backward=_backward,
    saves="logits",
    triton=Kernel(rowwise="logits"),
)


def dispersion(logits: Tensor, *, detach: bool = True) -> Tensor:
    """How sure a classifier is: variance and negative entropy of its softmax, each 0 if uniform and 1 if one-hot.

    With p the softmax of a row and H its entropy ``(sum p^2 - 1 / C) / (1 - 1 / C)`` and ``1 - H / log C``: the
    dispersion of Mowst (arXiv 2311.05185), of which its gate makes a confidence. The softmax is not stored.

    Args:
        logits: ``[n, C]``, C >= 2; float32, bfloat16, float16 or float64.
        detach: whether no gradient is taken, as the published code does: a classifier then cannot learn to be sure.

    Returns:
        ``[n, 2]``, float32 (float64 for float64 logits). Differentiable, once, if not ``detach``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.dispersion(torch.tensor([[0.0, 0.0], [0.0, 50.0]]))
        tensor([[0., 0.],
                [1., 1.]])
    """
    checks.is_float_tensor("dispersion", "logits", logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        checks.fail("dispersion", "logits", "of shape (n, C) with at least two classes", tuple(logits.shape))
    found: Tensor = DISPERSION(logits.detach() if detach else logits)
    return found
