"""The supervised contrastive loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks


def supcon(z: Tensor, y: Tensor, tau: float = 0.1) -> Tensor:
    """Supervised contrastive loss of rows of unit norm; a scalar in the dtype of z.

    With ``s_ij = z_i . z_j / tau`` and ``P_i = {j != i : y_j = y_i}``:
    ``L = (1 / N) sum_i ( log sum_{j != i} exp s_ij - (1 / |P_i|) sum_{j in P_i} s_ij )``, where anchors without a
    positive add 0. N x N numbers are kept for the backward pass.

    Args:
        z: ``[N, D]``, the views one behind the other.
        y: ``[N]``, equal for what is to be close.

    Raises:
        ValueError, TypeError: naming `y` or `tau`.
    """
    if y.shape != z.shape[:1]:
        checks.fail("methods.supcon", "y", f"one label a row of z, [{len(z)}]", list(y.shape))
    s = z @ z.T / checks.number("methods.supcon", "tau", tau, low=0.0, open_low=True)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (y[:, None] == y) & ~own
    count = positive.sum(1)
    lse = s.masked_fill(own, -torch.inf).logsumexp(1)
    each = lse - (s * positive).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, each, 0.0).sum() / len(z)
