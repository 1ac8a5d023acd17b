"""Logits like those of language models, and the plain-PyTorch procedures that logit fusion is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..case import wide

GRID = [0.1 * (j + 1) for j in range(20)]


def models(
    rows: int, width: int, count: int = 1, dtype: torch.dtype = torch.float32, uniform: bool = False
) -> Callable[[torch.Generator, torch.device], tuple[Any, ...]]:
    """An inputs factory: ``(base, expert_1..count, anti[, uniform])``, each logit tensor ``[rows, width]``.

    The models agree on some likely tokens (peaks of up to 9 nats), tuning shifts logits by a normal of 0.4 and a
    few bumps, so that KL(expert || anti) is 0.1 to 2 nats.
    """

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def noise(scale: float) -> Tensor:
            return torch.randn(rows, width, generator=generator, device=device) * scale

        def bumps(number: int, height: float) -> Tensor:
            where = torch.randint(width, (rows, number), generator=generator, device=device)
            heights = torch.rand(rows, number, generator=generator, device=device) * height
            return torch.zeros(rows, width, device=device).scatter_(1, where, heights)

        common = noise(1.5) + bumps(20, 9.0)
        anti = common + noise(0.7)
        experts = [anti + noise(0.4) + bumps(8, 5.0) for _ in range(count)]
        logits = [(1.1 * common + noise(0.5) + 2.0).to(dtype), *(e.to(dtype) for e in experts), anti.to(dtype)]
        draws = [torch.rand(rows, generator=generator, device=device)] if uniform else []
        return (*logits, *draws)

    return make


def _shift_and_target(base: Tensor, *small: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base, its log-probabilities, the sum of shifts and the mean target; ``small`` is the experts, then anti."""
    base, *experts, anti = (z.float() for z in (base, *small))
    l0 = anti.log_softmax(-1)
    targets = [(lk.exp() * (lk - l0)).sum(-1) for lk in (z.log_softmax(-1) for z in experts)]
    d = experts[0] - anti
    for expert in experts[1:]:
        d = d + (expert - anti)
    return base, base.log_softmax(-1), d, torch.stack(targets).mean(0) if len(targets) > 1 else targets[0]


def grid_loop(base: Tensor, *small: Tensor) -> Tensor:
    """The paper's search over 0.1, 0.2, ..., 2.0, one candidate at a time: alpha ``[B]``, the same for all experts."""
    base, lp, d, target = _shift_and_target(base, *small)
    best = torch.full_like(target, torch.inf)
    alpha = torch.zeros_like(target)
    for a in GRID:
        q = (base + a * d).log_softmax(-1)
        miss = ((q.exp() * (q - lp)).sum(-1) - target).square()
        alpha = torch.where(miss < best, a, alpha)
        best = torch.minimum(miss, best)
    return alpha


def grid_vec(base: Tensor, *small: Tensor) -> Tensor:
    """The same with all candidates at once, ``[20, B, V]``."""
    base, lp, d, target = _shift_and_target(base, *small)
    grid = torch.tensor(GRID, device=base.device)
    q = (base + grid[:, None, None] * d).log_softmax(-1)
    miss = ((q.exp() * (q - lp)).sum(-1) - target).square()
    return grid[miss.argmin(0)]


def shifted(base: Tensor, *small: Tensor) -> Tensor:
    """base + sum_k (expert_k - anti) in float32 (float64): proxy-tuning with weight 1."""
    z, *experts, anti = (wide(x) for x in (base, *small))
    for expert in experts:
        z = z + (expert - anti)
    return z


def inv_cdf(z: Tensor, uniform: Tensor) -> Tensor:
    """Token ``[B]`` by inverse CDF: the strongest plain-PyTorch sampler on a CPU."""
    mass = z.softmax(-1).cumsum(-1)
    return torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0].clamp_max(z.shape[1] - 1)


def multinomial(z: Tensor) -> tuple[Tensor, Tensor]:
    """``(probabilities, token)`` by softmax and torch.multinomial, as in Hugging Face's generate."""
    p = z.softmax(-1)
    return p, torch.multinomial(p, 1)[:, 0]


def nucleus_by_sort(z: Tensor, top_p: float) -> Tensor:
    """Logits with -inf outside the nucleus: sort, softmax, cumulative sum, scatter."""
    values, order = z.sort(-1, descending=True)
    p = values.softmax(-1)
    drop = p.cumsum(-1) - p >= top_p
    return z.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def model_arithmetic(base: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """One GenARM step in the public runner's order of operations (alpha 1): ``(probabilities, token)``.

    Normalises each model in its own dtype, then walks the rows in Python: weighted mean, renormalise, temperature
    1/N, a top-p filter that is entered (and sorts) although top_p is 1, a draw; then its statistics, a few scalars
    read back to the host a row and model.
    """
    logps = [z.log_softmax(-1).float() for z in (base, reward)]
    total = float(len(logps))
    probabilities, tokens = [], []
    for row in range(base.shape[0]):
        output = sum((logp[row] for logp in logps), torch.zeros_like(logps[0][row])) / total
        output = output.log_softmax(-1)
        scaled = output / (1.0 / total)
        values, order = scaled.sort(descending=True)
        drop = values.softmax(-1).cumsum(-1) > 1.0
        drop[1:] = drop[:-1].clone()
        drop[0] = False
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -torch.inf)
        p = scaled.softmax(-1)
        token = torch.multinomial(p, 1)[0]
        _statistics(p, [logp[row] for logp in logps], token)
        probabilities.append(p)
        tokens.append(token)
    return torch.stack(probabilities), torch.stack(tokens)


def _statistics(p: Tensor, logps: list[Tensor], token: Tensor) -> list[float]:
    found = [float((-p * p.clamp_min(1e-30).log()).sum().item())]
    for logp in logps:
        q = logp.softmax(-1)
        found.append(float((p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum().item()))
        found.append(float(logp.softmax(-1).max().item()))
        found.append(float(q[token].item()))
    return found
