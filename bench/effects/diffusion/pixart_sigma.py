"""PixArt-Sigma (arXiv 2403.04692): what raising the resolution and compressing keys and values cost, and for how long.

Patches of two photographs, the right quarter of them held out: 16 x 16 without compression, then 32 x 32 with positions
interpolated, then the deeper half of the blocks compressed 2 x 2 to one and fine-tuned, started as an average with a
LayerNorm (the paper's), at random, or as the plain mean; the control is fine-tuned as long without compression.
Held-out noise-prediction loss right after each switch and after 40 steps. Nothing is chosen.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, one_hot

from w2s_fast import checks
from w2s_fast.methods._common.loop import train
from w2s_fast.methods.diffusion import pixart_sigma, w2sd
from w2s_fast.nn import PixArtSigma

from ..llama import recipe
from ..protocol import Claim

LOW, HIGH, BATCH, HELD_OUT = 16, 32, 8, 64
STARTS = ("none", "averaging", "random", "plain mean")
STEPS = (200, 60, 40)  # small, large, after the switch to compression
FULL = {"STEPS": (1800, 600, 360), "BATCH": 16}
CLAIMS = [
    Claim("interpolated positions cost less than continued ones", "right after", "interpolated", "continued", 0.0,
          "lower"),
    Claim("right after: the averaging start costs less than a random one", "right after", "averaging", "random", 0.0,
          "lower"),
    Claim("tuned: the averaging start is ahead of a random one", "tuned", "averaging", "random", 0.0, "lower"),
    Claim("tuned: within 10 % of the control", "above control", "averaging", 0.1, 0.0, "lower"),
    Claim("the plain mean, without parameters, is at least as good", "tuned", "plain mean", "averaging", -0.0002,
          "lower"),
]  # fmt: skip


class Patches(NamedTuple):
    """Patches ``[B, 3, side, side]`` in [-1, 1] and captions ``[B, 1, 2]``: which photograph."""

    x: Tensor
    caption: Tensor


@lru_cache(maxsize=1)
def photographs() -> Tensor:
    """The two photographs that come with scikit-learn, at half size: ``[2, 3, 213, 320]`` in [-1, 1]."""
    with checks.extra("demo"):
        import PIL  # noqa: F401  (scikit-learn decodes the files with it)
        from sklearn.datasets import load_sample_images

    pictures = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return avg_pool2d(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, 2)


def patches(photos: Tensor, count: int, side: int, generator: torch.Generator, held_out: bool = False) -> Patches:
    """Random windows of 32 x 32, mirrored half the time, averaged down to ``side``; the right quarter is held out."""
    _, _, height, width = photos.shape
    edge = width * 3 // 4
    which = torch.randint(2, (count,), generator=generator)
    top = torch.randint(height - HIGH + 1, (count,), generator=generator)
    low, high = (edge, width - HIGH + 1) if held_out else (0, edge - HIGH + 1)
    left = torch.randint(low, high, (count,), generator=generator)
    rows, columns = top[:, None] + torch.arange(HIGH), left[:, None] + torch.arange(HIGH)
    x = photos[which[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    return Patches(avg_pool2d(x, HIGH // side), one_hot(which, 2).float()[:, None])


@torch.no_grad()
def evaluate(model: PixArtSigma, side: int) -> float:
    """The loss on held-out patches, noise and times the same at every evaluation."""
    draw = torch.Generator().manual_seed(12345)
    given = patches(photographs(), HELD_OUT, side, draw, held_out=True)
    noise, t = torch.randn(given.x.shape, generator=draw), torch.arange(HELD_OUT) * 1000 // HELD_OUT
    return w2sd.noise_loss(model.eval(), given.x, given.caption, abar=w2sd.linear_abar(), noise=noise, t=t).item()


def taught(model: PixArtSigma, side: int, steps: int, rate: float, batch: int, seed: int) -> None:
    draw, abar = torch.Generator().manual_seed(seed), w2sd.linear_abar()

    def loss(model: Any, _: int) -> Tensor:
        given = patches(photographs(), batch, side, draw)
        return w2sd.noise_loss(model, given.x, given.caption, abar=abar, draw=draw)

    train(model, loss, range(steps), recipe(steps, rate))


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixArtSigma(LOW, in_channels=3, out_channels=3, dim=64, depth=4, num_heads=4, caption_features=2,
                            caption_tokens=1, interpolation=1.0)  # fmt: skip
        taught(model, LOW, STEPS[0], 0.02, 2 * BATCH, seed)
        found: dict[str, dict[str, float]] = {"16 x 16": {"tuned": evaluate(model, LOW)}}
        model.set_resolution(HIGH, 1.0)
        found["continued"] = {"right after": evaluate(model, HIGH)}
        model.set_resolution(LOW, 1.0)
        pixart_sigma.raise_resolution(model, HIGH)
        found["interpolated"] = {"right after": evaluate(model, HIGH)}
        taught(model, HIGH, STEPS[1], 0.006, BATCH, seed + 1)
        for start in STARTS:
            own = copy.deepcopy(model)
            if start != "none":
                pixart_sigma.compress(own, start, seed=seed)
            after = evaluate(own, HIGH)
            taught(own, HIGH, STEPS[2], 0.002, BATCH, seed + 2)
            found[start] = {"right after": after, "tuned": evaluate(own, HIGH)}
            found[start]["above control"] = found[start]["tuned"] / found["none"]["tuned"] - 1
    return found
