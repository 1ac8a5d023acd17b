"""Improved consistency training (iCT, arXiv 2310.14189): samples in one or two network passes, without a teacher.

The network learns that two noise levels of one sample have the same origin: pairs of neighbouring levels drawn from a
discretised log-normal, Pseudo-Huber distance, weight 1 / (sigma_{i+1} - sigma_i), the number of levels doubling as
training goes on, an average of the weights for sampling. Plain consistency training (arXiv 2303.01469) for comparison:
uniform levels, squared distance, weight 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.diffusion.ict_loss import ict_loss
from ...ops.diffusion.noise_pair import noise_pair
from ...ops.diffusion.schedule import (
    SIGMA_MAX,
    SIGMA_MIN,
    consistency_scalings,
    ict_schedule,
    karras_sigmas,
    lognormal_index_probs,
)
from .._common.batches import shuffled
from .._common.classify import inputs_of
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import Place, drawn


def network(model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    """F(c_in x, c_noise) of a model of samples ``[N, ...]`` and their noise labels ``[N]``, 250 log sigma."""
    scalings = consistency_scalings(sigma)
    found = model(scalings.input.view(-1, *[1] * (x.ndim - 1)) * x, scalings.noise)
    return found if isinstance(found, Tensor) else found.sample  # type: ignore[no-any-return]


@torch.no_grad()
def consistency(model: nn.Module, x: Tensor, sigma: float) -> Tensor:
    """f(x, sigma): the origin of x at level sigma."""
    level = torch.full((len(x),), sigma, device=x.device)
    skip, out = (part.view(-1, *[1] * (x.ndim - 1)) for part in consistency_scalings(level)[:2])
    found: Tensor = skip * x + out * network(model, x, level)
    return found


def sample(
    model: nn.Module, noise: Tensor, again: Sequence[Tensor] = (), levels: Sequence[float] = (0.8,)
) -> Tensor:
    """Samples from standard normal ``noise [N, ...]``, in one pass, and one more for each of ``again`` at its level."""
    x = consistency(model, SIGMA_MAX * noise, SIGMA_MAX)
    for more, level in zip(again, levels, strict=False):
        x = consistency(model, x + math.sqrt(level**2 - SIGMA_MIN**2) * more, level)
    return x


class Average:
    """An exponential average of a model's weights: a copy that follows."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an update of ``model``."""
        for kept, new in zip(self.model.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach().to(kept.device), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Of the copy."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.model.load_state_dict(state)


def loss(model: nn.Module, x: Tensor, step: int, steps: int, *, end: int = 160, improved: bool = True,
         draw: torch.Generator | None = None, where: Place | None = None) -> Tensor:  # fmt: skip
    """Of clean samples ``x [N, ...]`` at a step; ``end``: noise levels in the last phase.

    Several processes (``where``) that draw from generators of one seed get the rows of one batch.
    """
    levels = ict_schedule(step, steps, end=end)
    sigmas = karras_sigmas(levels)
    likely = lognormal_index_probs(levels) if improved else torch.ones(len(sigmas) - 1)
    index = drawn(lambda n: torch.multinomial(likely, n, replacement=True, generator=draw), len(x), where)
    low, high = sigmas[index].to(x.device), sigmas[index + 1].to(x.device)
    noise = drawn(lambda n: torch.randn(n, *x.shape[1:], generator=draw), len(x), where)
    x_low, x_high = noise_pair(x, noise.to(x), low, high)
    state = torch.get_rng_state()
    with torch.no_grad():  # the same dropout for both, as the paper has it
        teacher = network(model, x_low, low)
    torch.set_rng_state(state)
    student = network(model, x_high, high)
    if improved:
        return ict_loss(student, teacher, x_high, x_low, high, low)
    shape = (-1, *[1] * (x.ndim - 1))
    (skip, out), (skip_low, out_low) = ([part.view(shape) for part in consistency_scalings(s)[:2]] for s in (high, low))
    gap: Tensor = skip * x_high + out * student - skip_low * x_low - out_low * teacher
    return gap.square().mean()


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, end: int = 160, ema: float = 0.99, improved: bool = True,
    average: Average | None = None, **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model(x, noise label)`` on samples of deviation about 0.5; it ends as the average of its weights.

    Args:
        data: map-style, of samples or tuples that begin with one.
        end: intervals of noise in the last phase.
        ema: decay of the average.
        improved: False for plain consistency training.
        average: kept by the caller, who then keeps ``model`` as it was last.
    """
    kept, draw = average or Average(model, ema), torch.Generator().manual_seed(recipe.seed)

    def of(model: nn.Module, batch: Any, step: int) -> Tensor:
        if step:
            kept.update(model)
        return loss(model, inputs_of(batch), step, recipe.steps, end=end, improved=improved, draw=draw,
                    where=run.get("where"))

    loader = data if hasattr(data, "batch_sampler") else shuffled(data, recipe.batch, seed=recipe.seed,
                                                                  where=run.get("where"))  # fmt: skip
    also = {"average": kept, "draw": draw, **run.pop("also", {})}
    found = run_loop(model, of, loader, recipe, also=also, **run)
    kept.update(model)
    if average is None:
        with torch.no_grad():
            for own, new in zip(model.parameters(), kept.model.parameters(), strict=True):
                own.copy_(new)
    return found
