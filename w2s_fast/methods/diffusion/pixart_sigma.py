"""PixArt-Sigma (arXiv 2403.04692): a weak diffusion transformer upgraded step by step to a strong one.

On patches of two photographs: train at low resolution without compression; raise the resolution, with the position
embedding interpolated to the old coordinates; compress keys and values of the deeper half of the blocks 2 x 2 to one
and fine-tune. After each switch the loss on held-out patches shows what it cost. Compression starts as an average of
each window followed by a LayerNorm (the paper's initialisation), at random, or as the plain mean without LayerNorm and
without parameters; the control is fine-tuned as long without compression.

The paper's own numbers: 256 to 512 pixels usable after 100 steps, converged after 1000; compression of blocks 14 to 27
of 28, usable after 100 steps; learning rate 2e-5, warm-up 1000, batch 256.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from ... import checks
from ...nn import KVCompressedAttention, PixArtSigma
from ...ops.diffusion.sampler import w2sd_sample
from .._common.console import progress
from .._common.models import fit
from .._common.report import figure, finish, parser

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
LOW, HIGH = 16, 32
STARTS = ("none", "averaging", "random", "plain mean")


@dataclass(frozen=True)
class Settings:
    """Sizes and steps; the paper's model has dim 1152, depth 28, 16 heads."""

    dim: int = 64
    depth: int = 4
    heads: int = 4
    low_steps: int = 600
    high_steps: int = 200
    tune_steps: int = 120
    batch: int = 16  # at high resolution; twice that at low
    rate: float = 0.02
    high_rate: float = 0.006
    tune_rate: float = 0.002
    held_out: int = 64


QUICK = Settings(dim=32, depth=2, heads=2, low_steps=60, high_steps=20, tune_steps=20, tune_rate=0.006, batch=8,
                 held_out=32)  # fmt: skip


class Patches(NamedTuple):
    """Patches ``[B, 3, side, side]`` in [-1, 1] and captions ``[B, 1, 2]``: which photograph."""

    x: Tensor
    caption: Tensor


class HeldOut(NamedTuple):
    """Held-out patches, noise and time labels, the same at every evaluation."""

    patches: Patches
    noise: Tensor
    t: Tensor


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


def noise_loss(model: PixArtSigma, given: Patches, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the predicted noise."""
    level = ABAR.float()[t][:, None, None, None]
    predicted: Tensor = model(level.sqrt() * given.x + (1 - level).sqrt() * noise, t, given.caption)
    return (predicted - noise).square().mean()


def held_out(photos: Tensor, count: int, side: int) -> HeldOut:
    """What every evaluation at this resolution uses; time labels evenly spread."""
    generator = torch.Generator().manual_seed(12345)
    given = patches(photos, count, side, generator, held_out=True)
    return HeldOut(given, torch.randn(given.x.shape, generator=generator), torch.arange(count) * 1000 // count)


@torch.no_grad()
def evaluate(model: PixArtSigma, test: HeldOut) -> float:
    """The loss on held-out patches."""
    training = model.training
    model.eval()
    value = noise_loss(model, *test).item()
    model.train(training)
    return value


def train(
    model: PixArtSigma, photos: Tensor, side: int, steps: int, rate: float, batch: int, *, test: HeldOut, seed: int,
    tick: Callable[[float], None] | None = None, checks: int = 10,
) -> list[tuple[int, float]]:  # fmt: skip
    """Train in place; ``(step, held-out loss)`` before, at ``checks`` points between and after."""
    generator = torch.Generator().manual_seed(seed)
    curve = []
    every = max(1, steps // checks)

    def loss(step: int) -> Tensor:
        if step % every == 0:
            curve.append((step, evaluate(model, test)))
        given = patches(photos, batch, side, generator)
        noise = torch.randn(given.x.shape, generator=generator)
        return noise_loss(model, given, noise, torch.randint(1000, (batch,), generator=generator))

    fit(model, loss, steps, rate, tick=tick)
    return [*curve, (steps, evaluate(model, test))]


def compress(model: PixArtSigma, start: str, seed: int) -> PixArtSigma:
    """A copy with the deeper half compressed 2 x 2 to one as `STARTS` says."""
    made = copy.deepcopy(model)
    if start != "none":
        made.enable_kv_compression(ratio=2, mode="mean" if start == "plain mean" else "conv")
    if start == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in made.modules():
                if isinstance(module, KVCompressedAttention) and module.sr is not None:
                    module.sr.reset_parameters()
    return made


def draw_samples(model: PixArtSigma, side: int, count: int = 8, steps: int = 25, seed: int = 0) -> Tensor:
    """DDIM samples ``[count, 3, side, side]``, half of each photograph."""
    model.eval()
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    caption = one_hot(torch.arange(count) * 2 // count, 2).float()[:, None]

    def network(x: Tensor, t: int, branch: str) -> Tensor:
        made: Tensor = model(x, torch.full((count,), t), caption)
        return made

    labels = [1 + 1000 // steps * i for i in reversed(range(steps))]
    return w2sd_sample(network, network, x, labels, ABAR, reflect_steps=0, guidance=1.0)


@dataclass
class Result:
    """Held-out losses and samples by stage.

    Fields: low, after training at low resolution; raised, right after the switch, by the treatment of positions;
    curves, ``[(step, loss)]`` of the high resolution and of each start of the compression.
    """

    low: float
    raised: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    samples: dict[str, Tensor]

    def above_control(self, start: str) -> list[float]:
        """Loss over that of the uncompressed control, less 1, at every step of the curve."""
        pairs = zip(self.curves[start], self.curves["none"], strict=True)
        return [loss / control - 1 for (_, loss), (_, control) in pairs]

    def recovery(self, start: str, share: float = 0.1) -> int | None:
        """Step from which on the loss stays within ``share`` of the control's; None if it does not."""
        apart = [step for (step, _), above in zip(self.curves[start], self.above_control(start), strict=True)
                 if above > share]  # fmt: skip
        later = [step for step, _ in self.curves[start] if not apart or step > apart[-1]]
        return later[0] if later else None


def run(settings: Settings | None = None, *, seed: int = 0, quiet: bool = False) -> Result:
    """The three phases; a bit over two minutes on one core."""
    s, photos = settings or Settings(), photographs()
    low_test, high_test = (held_out(photos, s.held_out, side) for side in (LOW, HIGH))
    with torch.random.fork_rng(devices=[]), progress(quiet) as start:
        torch.manual_seed(seed)
        model = PixArtSigma(
            LOW, in_channels=3, out_channels=3, dim=s.dim, depth=s.depth, num_heads=s.heads, caption_features=2,
            caption_tokens=1, interpolation=1.0,
        )  # fmt: skip
        train(model, photos, LOW, s.low_steps, s.rate, 2 * s.batch, test=low_test, seed=seed, checks=1,
              tick=start(f"{LOW} x {LOW}, no compression", s.low_steps))  # fmt: skip
        result = Result(evaluate(model, low_test), {}, {}, {f"{LOW} x {LOW}": draw_samples(model, LOW)})
        for name, interpolation in (("positions continued", 1.0), ("positions interpolated", HIGH / LOW)):
            model.set_resolution(HIGH, interpolation)
            result.raised[name] = evaluate(model, high_test)
        result.curves["high resolution"] = train(
            model, photos, HIGH, s.high_steps, s.high_rate, s.batch, test=high_test, seed=seed + 1,
            tick=start(f"{HIGH} x {HIGH}, no compression", s.high_steps),
        )  # fmt: skip
        result.samples[f"{HIGH} x {HIGH}"] = draw_samples(model, HIGH)
        for name in STARTS:
            tuned = compress(model, name, seed)
            if name == "averaging":
                result.samples[f"compressed, {name} start"] = draw_samples(tuned, HIGH)
            result.curves[name] = train(
                tuned, photos, HIGH, s.tune_steps, s.tune_rate, s.batch, test=high_test, seed=seed + 2,
                tick=start(f"{HIGH} x {HIGH}, compression: {name}", s.tune_steps),
            )  # fmt: skip
            if name in ("averaging", "random"):
                result.samples[f"compressed, {name} start, {s.tune_steps} steps later"] = draw_samples(tuned, HIGH)
    return result


def draw(result: Result) -> Any:
    """Curves on the left, samples on the right."""
    drawn = figure(13, 1.15 * len(result.samples))
    if drawn is None:
        return None
    left, right = drawn.subfigures(1, 2, width_ratios=(1, 1.1))
    axis = left.subplots()
    before = result.curves["high resolution"][-1][1]
    axis.axhline(before, color="#888888", linewidth=1, linestyle=":", label="before compression")
    for name, colour in zip(STARTS, ("#8c9bab", "#2b5c8a", "#d9582b", "#4a9c6d"), strict=True):
        axis.plot(*zip(*result.curves[name], strict=True), marker="o", markersize=3, color=colour,
                  label="no compression" if name == "none" else f"compression, {name} start")  # fmt: skip
    axis.set(xlabel="steps after the switch", ylabel="held-out loss", title="Fine-tuning to compressed attention")
    axis.set_yscale("log")
    losses = [loss for name in STARTS for _, loss in result.curves[name]]
    ticks = [t for t in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5) if min(losses) / 1.3 < t < 1.3 * max(losses)]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_yticks([], minor=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    rows = right.subplots(len(result.samples), 1)
    for axis, (name, made) in zip(rows, result.samples.items(), strict=True):
        strip = torch.cat(list(interpolate(made, size=(HIGH, HIGH))), 2)
        axis.imshow(((strip.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    return drawn


def table(result: Result) -> Any:
    """The losses at and after each switch; last the step from which on a loss is within 10% of the control's."""
    from rich.table import Table

    made = Table(title="Mean squared error of the predicted noise on held-out patches")
    for column in ("switch", "before", "right after", "tuned", "vs control", "<10% from"):
        made.add_column(column, justify="left" if column == "switch" else "right")
    high = result.curves["high resolution"]
    for name, loss in result.raised.items():
        tuned = f"{high[-1][1]:.4f}" if name == "positions interpolated" else ""
        made.add_row(f"{LOW} to {HIGH}, {name}", f"{result.low:.4f}", f"{loss:.4f}", tuned)
    for name in STARTS:
        curve, back = result.curves[name], result.recovery(name)
        label = "no compression (control)" if name == "none" else f"compressed, {name} start"
        above = f"{result.above_control(name)[-1]:+.0%}", "never" if back is None else f"step {back}"
        made.add_row(label, f"{high[-1][1]:.4f}", f"{curve[0][1]:.4f}", f"{curve[-1][1]:.4f}",
                     *(above if name != "none" else ()))  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> int:
    """`w2s-fast train pixart_sigma`: print the losses, write pixart_sigma.png and pixart_sigma.json."""
    from rich.console import Console

    given = parser("pixart_sigma", __doc__, seeds=1).parse_args(arguments)
    console, results = Console(), {}
    for seed in given.seeds:
        results[seed] = run(QUICK if given.quick else Settings(), seed=seed)
        console.print(table(results[seed]))
    report = {seed: {"low": r.low, "raised": r.raised, "curves": r.curves} for seed, r in results.items()}
    finish(given.out, "pixart_sigma", {"seeds": report}, draw(results[given.seeds[0]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
