"""W2SD (arXiv 2502.00473): reflection between a strong and a weak diffusion model, sampling past the strong one.

A denoising step of the strong model and an inversion step of the weak one move a latent along the difference of their
scores. The bet is that strong minus weak points where truth minus strong does. `sample` needs no training; `train`
fine-tunes a noise predictor, which makes a strong model of a weak one or the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.diffusion.sampler import Network, w2sd_sample
from .._common.batches import shuffled
from .._common.classify import inputs_of
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import Place, drawn


def linear_abar(steps: int = 1000, low: float = 1e-4, high: float = 0.02) -> Tensor:
    """Cumulative products of DDPM's linear schedule (arXiv 2006.11239), float64."""
    return torch.cumprod(1 - torch.linspace(low, high, steps, dtype=torch.float64), 0)


def labels(steps: int, total: int = 1000) -> list[int]:
    """Evenly spaced time labels, 981, 961, ..., 1 for 50 steps of 1000."""
    return [1 + total // steps * i for i in reversed(range(steps))]


def without_guidance(model: Callable[..., Any], *inputs: Any) -> Network:
    """A noise predictor ``model(x, t, *inputs)``, t ``[N]``, as the sampler asks for it; of diffusers' models too."""

    def network(x: Tensor, t: int, branch: str) -> Any:
        found = model(x, torch.full((len(x),), t, device=x.device), *inputs)
        return found if isinstance(found, Tensor) else found.sample

    return network


@torch.no_grad()
def sample(
    strong: Callable[..., Any], weak: Callable[..., Any], noise: Tensor, *, steps: int = 50,
    abar: Sequence[float] | Tensor | None = None, inputs: Sequence[Any] = (), **settings: Any,
) -> Tensor:  # fmt: skip
    """Samples from standard normal ``noise [N, ...]``, models without guidance branches; see `w2s_fast.w2sd_sample`.

    ``reflect_steps=0`` is DDIM of the strong model. For guidance, or a gap of guidance, call the op with networks that
    answer for the branches.
    """
    table = linear_abar() if abar is None else abar
    ours, theirs = (without_guidance(model, *inputs) for model in (strong, weak))
    return w2sd_sample(ours, theirs, noise, labels(steps, len(table)), table, guidance=1.0, strong_guidance=1.0,
                       weak_guidance=1.0, **settings)  # fmt: skip


def noise_loss(
    model: Callable[..., Any], x: Tensor, *inputs: Any, abar: Tensor, draw: torch.Generator | None = None,
    noise: Tensor | None = None, t: Tensor | None = None, where: Place | None = None,
) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted noise, at random (or the given) levels ``t [N]``.

    Several processes (``where``) that draw from generators of one seed get the rows of one batch.
    """
    if t is None:
        t = drawn(lambda n: torch.randint(len(abar), (n,), generator=draw), len(x), where)
    if noise is None:
        noise = drawn(lambda n: torch.randn(n, *x.shape[1:], generator=draw), len(x), where)
    level = abar.float()[t.cpu()].view(-1, *[1] * (x.ndim - 1)).to(x.device)
    noise = noise.to(x)
    found = model(level.sqrt() * x + (1 - level).sqrt() * noise, t.to(x.device), *inputs)
    found = found if isinstance(found, Tensor) else found.sample
    return (found - noise).square().mean()


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, abar: Tensor | None = None, **run: Any
) -> Trained:  # fmt: skip
    """Train ``model(x, t)`` to predict the noise in ``data``: a map-style dataset of samples, or tuples of one."""
    table, draw = linear_abar() if abar is None else abar, torch.Generator().manual_seed(recipe.seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return noise_loss(model, inputs_of(batch), abar=table, draw=draw, where=run.get("where"))

    loader = data if hasattr(data, "batch_sampler") else shuffled(data, recipe.batch, seed=recipe.seed,
                                                                  where=run.get("where"))  # fmt: skip
    return run_loop(model, loss, loader, recipe, also={"draw": draw, **run.pop("also", {})}, **run)
