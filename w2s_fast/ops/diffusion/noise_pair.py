"""noise_pair: the two noisy inputs of a consistency model's training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from .ddim_step import DDIM_STEP
from .pseudo_huber_loss import as_rows, per_sample, same_samples


def _plain(x: Tensor, z: Tensor, sigma_t: Tensor | float, sigma_s: Tensor | float) -> Any:
    def at(sigma: Tensor | float) -> Tensor:
        if not isinstance(sigma, Tensor):
            return torch.add(x, z, alpha=sigma)
        return torch.addcmul(x, z, sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))

    return (at(sigma_t), at(sigma_s)) if x.dtype == z.dtype else NotImplemented


@or_plain(_plain)
def noise_pair(x: Tensor, z: Tensor, sigma_t: Tensor | float, sigma_s: Tensor | float) -> tuple[Tensor, Tensor]:
    """The same noise at two levels, ``(x + sigma_t z, x + sigma_s z)``: inputs of a consistency model's two passes.

    Args:
        x, z: ``(B, ...)`` data and noise of one shape.
        sigma_t, sigma_s: numbers or ``(B)``: the teacher's (lower) and the student's level.

    Returns:
        Two tensors like x, computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.noise_pair(torch.zeros(1, 2), torch.ones(1, 2), 0.5, torch.tensor([2.0]))
        (tensor([[0.5000, 0.5000]]), tensor([[2., 2.]]))
    """
    op = "noise_pair"
    same_samples(op, "z", z, "x", x)
    wide = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    plain, column = wide == x.dtype == z.dtype, (-1,) + (1,) * (x.ndim - 1)

    def at(name: str, sigma: Tensor | float) -> Tensor:
        if not isinstance(sigma, Tensor):
            level = checks.number(op, name, sigma, low=0.0)
            return torch.add(x, z, alpha=level) if plain else step(None, level)
        per_sample(op, name, sigma, x)
        if plain:
            return torch.addcmul(x, z, sigma.to(wide).reshape(column))
        if sigma.requires_grad:
            return (x.to(wide) + z.to(wide) * sigma.to(wide).reshape(column)).to(x.dtype)
        return step(torch.stack((torch.ones_like(sigma), sigma), 1).to(wide), 1.0)

    def step(levels: Tensor | None, level: float) -> Tensor:
        """A sampler's step with other numbers: one pass, where widening makes five."""
        found: Tensor = DDIM_STEP(as_rows(x), as_rows(z), None, levels, 1.0, level, 0.0)
        return found.view(x.shape)

    return at("sigma_t", sigma_t), at("sigma_s", sigma_s)
