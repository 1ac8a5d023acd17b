"""The supervised contrastive loss of two views and labels, as the methods call it."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...ops.contrastive.contrastive_loss import contrastive_loss


def supcon(z: Tensor, y: Tensor, tau: float = 0.1) -> Tensor:
    """`contrastive_loss` of kind "supcon" of rows of unit norm with themselves; a scalar.

    With ``s_ij = z_i . z_j / tau`` and ``P_i = {j != i : y_j = y_i}``:
    ``L = (1 / N) sum_i ( log sum_{j != i} exp s_ij - (1 / |P_i|) sum_{j in P_i} s_ij )``, where anchors without a
    positive add 0.

    Args:
        z: ``[N, D]``, the views one behind the other.
        y: ``[N]``, equal for what is to be close.

    Raises:
        ValueError, TypeError: naming `y` or `tau`.
    """
    if y.shape != z.shape[:1]:
        checks.fail("methods.supcon", "y", f"one label a row of z, [{len(z)}]", list(y.shape))
    scale = 1 / checks.number("methods.supcon", "tau", tau, low=0.0, open_low=True)
    return contrastive_loss(z, scale=scale, kind="supcon", labels=y.long())
