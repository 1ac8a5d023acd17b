"""Tables of improved consistency training (iCT, arXiv 2310.14189): noise levels, their distribution and weights.

Computed in float64 and returned as float32 tensors on the CPU, except where a plain number is returned.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import checks

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, RHO = 0.002, 80.0, 0.5, 7.0


class Scalings(NamedTuple):
    """Fields: skip, out, input, noise: c_skip, c_out, c_in and c_noise of ``skip x + out F(input x, noise)``."""

    skip: Any
    out: Any
    input: Any
    noise: Any


Level = TypeVar("Level", float, Tensor)


def consistency_scalings(sigma: Level, *, sigma_min: float = SIGMA_MIN, sigma_data: float = SIGMA_DATA) -> Scalings:
    """``f(x, sigma) = c_skip x + c_out F(c_in x, c_noise)`` with f(x, sigma_min) = x exactly.

    ``c_skip = d^2 / ((sigma - sigma_min)^2 + d^2)``, ``c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2)``,
    ``c_in = 1 / sqrt(sigma^2 + d^2)``, ``c_noise = 250 ln sigma``, d = sigma_data.

    Args:
        sigma: a number or a tensor of any shape; the scalings are of the same kind.
        sigma_min: the level at which f is the identity; 0 gives the scalings of a Karras denoiser.
        sigma_data: standard deviation of the data.

    Example:
        >>> from w2s_fast.ops.diffusion.schedule import consistency_scalings
        >>> consistency_scalings(0.002).skip, consistency_scalings(0.002).out
        (1.0, 0.0)
    """
    skip, out = skip_and_out(sigma, sigma_min, sigma_data)
    total: Any = sigma * sigma + sigma_data**2
    root = total.sqrt() if isinstance(sigma, Tensor) else math.sqrt(total)
    noise = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
    return Scalings(skip, out, 1 / root, 250 * noise)


def skip_and_out(sigma: Any, sigma_min: float, sigma_data: float) -> tuple[Any, Any]:
    """c_skip and c_out alone."""
    above, total = sigma - sigma_min, sigma * sigma + sigma_data**2
    root = total.sqrt() if isinstance(sigma, Tensor) else math.sqrt(total)
    return sigma_data**2 / (above * above + sigma_data**2), sigma_data * above / root


def ict_schedule(step: int, steps: int, *, start: int = 10, end: int = 1280) -> int:
    """Number of noise levels N at a training step: ``min(start 2^floor(step / K'), end) + 1``.

    ``K' = floor(steps / (log2(floor(end / start)) + 1))``, so that the number of intervals doubles in equal phases.

    Args:
        step: k, from 0.
        steps: K, of the whole training.
        start, end: s0 and s1, intervals of the first and of the last phase.

    Returns:
        N, from ``start + 1`` to ``end + 1``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import w2s_fast
        >>> [w2s_fast.ict_schedule(k, 400_000) for k in (0, 50_000, 399_999)]
        [11, 21, 1281]
    """
    op = "ict_schedule"
    checks.integer(op, "step", step, low=0)
    checks.integer(op, "steps", steps, low=1)
    checks.integer(op, "start", start, low=1)
    checks.integer(op, "end", end, low=start)
    phase = max(1, math.floor(steps / (math.log2(end // start) + 1)))
    # 2^60 intervals are past any end: no huge power where a short training runs past its phases
    return min(start << min(step // phase, 60), end) + 1


def karras_sigmas(
    levels: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Noise levels in increasing order, ``(levels)``, evenly spaced in ``sigma^(1/rho)`` (arXiv 2206.00364).

    Args:
        levels: N >= 2.
        sigma_min, sigma_max: first and last level, 0 < sigma_min < sigma_max.
        rho: > 0; larger puts more levels near sigma_min.

    Returns:
        float32 ``(levels)``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import w2s_fast
        >>> w2s_fast.karras_sigmas(3)
        tensor([2.0000e-03, 2.5152e+00, 8.0000e+01])
    """
    return _sigmas("karras_sigmas", levels, sigma_min, sigma_max, rho).float()


def lognormal_index_probs(
    levels: int, *, mean: float = -1.1, std: float = 2.0, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:  # fmt: skip
    """How often each interval ``[sigma_i, sigma_{i+1}]`` is trained on: a log-normal, discretised.

    ``p_i ~ erf((ln sigma_{i+1} - mean) / (sqrt 2 std)) - erf((ln sigma_i - mean) / (sqrt 2 std))``, sum 1.

    Args:
        levels: N >= 2 of `karras_sigmas`.
        mean, std: of ln sigma.
        sigma_min, sigma_max, rho: see `karras_sigmas`.

    Returns:
        float32 ``(levels - 1)``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import w2s_fast
        >>> w2s_fast.lognormal_index_probs(4).sum().item()
        1.0
    """
    op = "lognormal_index_probs"
    checks.number(op, "mean", mean)
    checks.number(op, "std", std, low=0.0, open_low=True)
    sigmas = _sigmas(op, levels, sigma_min, sigma_max, rho)
    mass = torch.erf((sigmas.log() - mean) / (math.sqrt(2) * std)).diff()
    return (mass / mass.sum()).float()


def ict_weights(
    levels: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Weight of the loss on each interval, ``1 / (sigma_{i+1} - sigma_i)``.

    Args:
        levels: N >= 2 of `karras_sigmas`.
        sigma_min, sigma_max, rho: see `karras_sigmas`.

    Returns:
        float32 ``(levels - 1)``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import w2s_fast
        >>> w2s_fast.ict_weights(3)
        tensor([0.3979, 0.0129])
    """
    return (1 / _sigmas("ict_weights", levels, sigma_min, sigma_max, rho).diff()).float()


def _sigmas(op: str, levels: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    checks.length(op, "levels", levels, low=2)
    checks.number(op, "sigma_min", sigma_min, low=0.0, open_low=True)
    checks.number(op, "sigma_max", sigma_max, low=sigma_min, open_low=True)
    checks.number(op, "rho", rho, low=0.0, open_low=True)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.linspace(low, high, levels, dtype=torch.float64) ** rho
