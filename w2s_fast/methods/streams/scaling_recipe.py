"""Qwen2.5's recipe (arXiv 2412.15115), as far as it is usable: fitted power laws, context phases, order by variance.

- The best peak learning rate and batch size are power laws ``c N^a D^b`` of model size and data: `optimum` finds the
  best rate of one configuration from a quadratic in log rate, `fit_power_law` the law through the optima of several.
- Context grows in phases with the base of the rotary embedding: `w2s_fast.optim.ContextPhaseSchedule`, `set_rope_base`.
- Prompts of reinforcement learning come in the order of their rewards' variance: `by_variance`.
- Domains are re-balanced with `w2s_fast.data.MixtureSampler`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import checks
from ...data import CurriculumSampler

OP = "methods.streams.scaling_recipe"


class PowerLaw(NamedTuple):
    """``exp(log_constant) prod_i x_i ** exponents[i]``."""

    exponents: tuple[float, ...]
    log_constant: float

    def __call__(self, *x: float) -> float:
        """The law at a point."""
        return math.exp(self.log_constant + sum(a * math.log(v) for a, v in zip(self.exponents, x, strict=True)))


def optimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the minimum of a quadratic in log rate, by least squares; at least three rates.

    Raises:
        ValueError: the fitted quadratic has no minimum, or it lies outside the rates tried (extend them).
    """
    if len(rates) < 3 or len(rates) != len(losses):
        checks.fail(OP, "rates", "at least three, one a loss", f"{len(rates)} and {len(losses)}")
    x = torch.tensor(rates, dtype=torch.float64).log()
    centre = x.mean()
    powers = torch.stack([(x - centre) ** p for p in range(3)], 1)
    _, slope, bend = torch.linalg.lstsq(powers, torch.tensor(losses, dtype=torch.float64)).solution.tolist()
    if not bend > 0:
        checks.fail(OP, "losses", "with a minimum in the rates", f"a curvature of {bend:.3g}")
    best = math.exp(float(centre) - slope / (2 * bend))
    if not min(rates) <= best <= max(rates):
        checks.fail(OP, "rates", "around the best one", f"{min(rates):g} to {max(rates):g} for {best:.3g}")
    return best


def fit_power_law(points: Sequence[tuple[Sequence[float], float]]) -> PowerLaw:
    """Log-linear least squares through ``((x_1, ..., x_k), y)``; at least k + 1 points, all numbers positive.

    Raises:
        ValueError: naming `points`.
    """
    if not points or any(v <= 0 for x, y in points for v in (*x, y)):
        checks.fail(OP, "points", "positive numbers", "none" if not points else "one that is not")
    rows = torch.tensor([[math.log(v) for v in x] + [1.0] for x, _ in points], dtype=torch.float64)
    if torch.linalg.matrix_rank(rows) < rows.shape[1]:
        checks.fail(OP, "points", f"{rows.shape[1]} or more that differ in every variable", len(points))
    logs = torch.tensor([math.log(y) for _, y in points], dtype=torch.float64)
    *exponents, constant = torch.linalg.lstsq(rows, logs).solution.tolist()
    return PowerLaw(tuple(exponents), constant)


def set_rope_base(model: nn.Module, base: float) -> int:
    """Give every rotary embedding of a Hugging Face model this base, in place; how many there were.

    Modules with a buffer ``inv_freq [d/2] = base^(-2 i / d)`` of the default type are changed, and the configuration
    with them, so that the saved model has it.

    Raises:
        ValueError: naming `model`.
    """
    found = 0
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if not isinstance(frequencies, Tensor):
            continue
        kind = getattr(module, "rope_type", "default")
        if kind != "default":
            checks.fail(OP, "model", "with rotary embeddings of the default type", repr(kind))
        exponent = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device) / len(frequencies)
        new = (1.0 / base**exponent).to(frequencies.dtype)
        frequencies.copy_(new)
        if isinstance(getattr(module, "original_inv_freq", None), Tensor):
            module.original_inv_freq = new.clone()
        found += 1
    if not found:
        checks.fail(OP, "model", "with rotary embeddings", type(model).__name__)
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "rope_parameters", None), Mapping):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": float(base)}
    elif hasattr(config, "rope_theta"):
        config.rope_theta = float(base)
    return found


def by_variance(rewards: Tensor, **sampler: Any) -> CurriculumSampler:
    """Prompts in the order of their rewards' variance, the highest first; ``rewards [prompts, samples]``.

    Raises:
        ValueError: naming `rewards`.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        checks.fail(OP, "rewards", "of shape [prompts, samples] with at least two samples", tuple(rewards.shape))
    return CurriculumSampler(-rewards.double().var(1, correction=0), **sampler)
