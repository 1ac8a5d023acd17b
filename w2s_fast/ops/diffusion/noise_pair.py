"""noise_pair: the two noisy inputs of a consistency model's training step."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .ddim_step import DDIM_STEP
from .pseudo_huber_loss import as_rows, per_sample, same_samples


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

    def at(name: str, sigma: Tensor | float) -> Tensor:
        each = isinstance(sigma, Tensor)
        if each:
            per_sample(op, name, sigma, x)
        else:
            sigma = checks.number(op, name, sigma, low=0.0)
        if wide == x.dtype == z.dtype:
            if not each:
                return torch.add(x, z, alpha=sigma)
            return torch.addcmul(x, z, sigma.to(wide).reshape((-1,) + (1,) * (x.ndim - 1)))
        if each and sigma.requires_grad:
            return (x.to(wide) + z.to(wide) * sigma.to(wide).reshape((-1,) + (1,) * (x.ndim - 1))).to(x.dtype)
        # a step of a sampler with other numbers: one pass, where widening makes five
        levels = torch.stack((torch.ones_like(sigma), sigma), 1).detach().to(wide) if each else None
        step = DDIM_STEP(as_rows(x), as_rows(z), None, levels, 1.0, 1.0 if each else sigma, 0.0)
        return step.view(x.shape)

    return at("sigma_t", sigma_t), at("sigma_s", sigma_s)
