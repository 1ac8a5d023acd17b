"""One deterministic step: a combination of a latent and guided predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


def ddim_step(
    x: Tensor, cond: Tensor | None, uncond: Tensor | None, levels: Tensor | None, a: float, b: float, guidance: float
) -> Tensor:
    """``a x + b m`` with ``m = uncond + guidance (cond - uncond)``, ``[B, D]`` in the dtype of x.

    With one prediction m is that one. levels ``[B, 2]`` holds a and b of each row; None: the numbers. Arithmetic in
    float32 (float64 if any input is).
    """
    given = [t for t in (cond, uncond) if t is not None]
    acc = accumulate_dtype(x, *given)
    if cond is not None and uncond is not None:
        m = torch.lerp(uncond.to(acc), cond.to(acc), guidance)
    else:
        m = given[0].to(acc)
    if levels is None:
        return torch.add(x.to(acc) * a, m, alpha=b).to(x.dtype)
    first, second = levels.to(acc).unsqueeze(2).unbind(1)
    return torch.addcmul(x.to(acc) * first, m, second).to(x.dtype)
