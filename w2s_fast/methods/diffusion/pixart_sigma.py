"""PixArt-Sigma (arXiv 2403.04692): a weak diffusion transformer upgraded step by step to a strong one.

Train at low resolution without compression; raise the resolution, with the position embedding interpolated to the old
coordinates; compress keys and values of the deeper half of the blocks 2 x 2 to one and fine-tune. Compression starts as
an average of each window followed by a LayerNorm (the paper's initialisation), at random, or as the plain mean without
LayerNorm and without parameters.

The paper's own numbers: 256 to 512 pixels usable after 100 steps, converged after 1000; compression of blocks 14 to 27
of 28, usable after 100 steps; learning rate 2e-5, warm-up 1000, batch 256.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import checks
from ...nn import KVCompressedAttention, PixArtSigma
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .w2sd import linear_abar, noise_loss

Start = Literal["averaging", "random", "plain mean"]


def compress(model: PixArtSigma, start: Start = "averaging", *, ratio: int = 2, seed: int = 0) -> PixArtSigma:
    """Compress the deeper half of the blocks, ``ratio`` x ``ratio`` tokens to one, in place; returns the model."""
    model.enable_kv_compression(ratio=ratio, mode="mean" if start == "plain mean" else "conv")
    if start == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in model.modules():
                if isinstance(module, KVCompressedAttention) and module.sr is not None:
                    module.sr.reset_parameters()
    return model


def raise_resolution(model: PixArtSigma, latent_size: int) -> PixArtSigma:
    """To another side of the latents, positions interpolated to the coordinates that the model has learned."""
    model.set_resolution(latent_size, model.interpolation * latent_size / (model.base_size * model.patch))
    return model


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, resolution: int = 0, compression: str = "none",
    abar: Tensor | None = None, **run: Any,
) -> Trained:  # fmt: skip
    """Fine-tune ``model(latents, t, captions)`` to predict the noise.

    Args:
        data: map-style, of latents ``[C, H, W]`` with caption features ``[L, F]``.
        resolution: raise a `PixArtSigma` to this side of its latents first, its positions interpolated; 0: leave it.
        compression: "averaging", "random" or "plain mean" compress it first, in place; "none" leaves it.
    """
    if resolution:
        raise_resolution(_pixart(model), resolution)
    if compression != "none":
        compress(_pixart(model), compression, seed=recipe.seed)  # type: ignore[arg-type]
    table, draw = linear_abar() if abar is None else abar, torch.Generator().manual_seed(recipe.seed)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return noise_loss(model, batch[0], *batch[1:], abar=table, draw=draw, where=run.get("where"))

    loader = data if hasattr(data, "batch_sampler") else shuffled(data, recipe.batch, seed=recipe.seed,
                                                                  where=run.get("where"))  # fmt: skip
    return run_loop(model, loss, loader, recipe, also={"draw": draw, **run.pop("also", {})}, **run)


def _pixart(model: nn.Module) -> PixArtSigma:
    if not isinstance(model, PixArtSigma):
        checks.fail("methods.pixart_sigma", "model", "a w2s_fast.nn.PixArtSigma to be changed", type(model).__name__)
    return model
